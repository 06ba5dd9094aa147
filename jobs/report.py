"""`raylign report RUN`: write report.html of a run anew."""

import sys
from collections.abc import Sequence

from jobs.cli import job_parser, run
from jobs.paths import run_address
from rl.store import RunFolder


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and write the report; returns the exit code."""
    parser = job_parser("report", "Write report.html of a run anew.")
    parser.add_argument("run", help="run folder, for example runs/demo")
    options = parser.parse_args(arguments)
    from rl.quality import write_quality
    from rl.report import write_report

    folder = RunFolder(run_address(options.run))
    if folder.exists("answers"):
        write_quality(folder)
    else:
        write_report(folder)
    print(folder.url("report.html"))
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
