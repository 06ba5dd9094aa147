"""`raylign keys`: make, list and revoke the API keys of the endpoint."""

import sys
import time
from collections.abc import Sequence

from jobs.cli import job_parser, run
from jobs.paths import run_address
from serve.keys import KeyFile
from serve.settings import ServeSettings


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and do it; returns the exit code."""
    parser = job_parser("keys", "Make, list and revoke API keys. A server that is running takes note at once.")
    actions = parser.add_subparsers(dest="action", required=True)
    for action, text in (("add", "make a key and print it, once"), ("revoke", "refuse a key from now on")):
        actions.add_parser(action, help=text).add_argument("name", help="whose key it is")
    actions.add_parser("list", help="show the names of the keys")
    default = ServeSettings().dir
    parser.add_argument("--dir", default=default, help=f"the serving folder (default: {default})")
    options = parser.parse_args(arguments)
    keys = KeyFile(run_address(options.dir))
    if options.action == "add":
        print(keys.add(options.name))
        print("keep it: only its hash is stored", file=sys.stderr)
    elif options.action == "revoke":
        keys.revoke(options.name)
        print(f"{options.name} is revoked")
    else:
        for name, created in keys.names().items():
            print(f"{name}\t{time.strftime('%Y-%m-%d %H:%M', time.localtime(created))}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
