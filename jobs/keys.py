"""`raylign keys`: make, list and revoke the API keys of the endpoint."""

import sys
import time
from collections.abc import Sequence

from jobs.cli import job_parser, run
from jobs.serve import serve_settings
from serve.keys import KeyFile
from serve.settings import FolderSettings


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and do it; returns the exit code."""
    parser = job_parser(
        "keys", "Make, list and revoke API keys. A server that is running takes note at once.", FolderSettings,
        positional=False,
    )  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True)
    for action, text in (
        ("add", "make a key and print it, once"),
        ("revoke", "refuse a key from now on"),
        ("list", "show the names of the keys"),
    ):
        one = actions.add_parser(action, help=text, description=f"{text.capitalize()}.")
        if action != "list":
            one.add_argument("name", help="whose key it is")
        one.add_argument("overrides", nargs="*", metavar="dir=…", help="the serving folder")
    options = parser.parse_args(arguments)
    keys = KeyFile(serve_settings(None, options.overrides).dir)
    if options.action == "add":
        print(keys.add(options.name))
        print("keep it: only its hash is stored", file=sys.stderr)
    elif options.action == "revoke":
        keys.revoke(options.name)
        print(f"{options.name} is revoked")
    else:
        names = keys.names()
        for name, created in names.items():
            print(f"{name}\t{time.strftime('%Y-%m-%d %H:%M', time.localtime(created))}")
        if not names:
            print("there are no keys; `raylign keys add NAME` makes one", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
