"""`raylign rollback`: put the version behind the name `aligned` that was there before."""

import sys
from collections.abc import Sequence

from jobs.cli import job_parser, run
from jobs.serve import announce, parse
from serve.settings import FolderSettings
from serve.versions import RegistryFile


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, change the registry and wait for the server; returns the exit code."""
    parser = job_parser(
        "rollback", "Put the version behind the name `aligned` that was there before: here, and in a running server.",
        FolderSettings, positional=False,
    )  # fmt: skip
    options, settings = parse(parser, arguments, takes="key=value")
    if options.runs:
        parser.error("rollback takes no run: it goes back by one version")
    file = RegistryFile(settings.dir)
    file.read()  # where nothing is served nothing is left behind
    with file.locked():
        before = file.read()
        wanted = before.roll_back()
        file.write(wanted, "rolled back", version=wanted.aligned.name)
    return announce(file, before)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
