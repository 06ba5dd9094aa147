"""The `raylign` command: one sub-command per job."""

import argparse
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from cluster.errors import RaylignError, describe

if TYPE_CHECKING:
    from pydantic import BaseModel

EXIT_CODES = """exit codes: 0 done, 1 unexpected error, 2 wrong usage, 3 config, 4 data, 5 cluster, 6 weight sync,
7 judge, 130 stopped by Ctrl-C (what was done is saved)"""

LEARNER_THREAD = "learner"

JOBS = {
    "align": "align a model to preferences, online",
    "annotate": "sample a model's answers, have them judged, and make pairs",
    "export": "write a run's pairs as one preference set in TRL's format",
    "sft": "train a model on given answers",
    "evaluate": "measure a model on the tiny world",
    "reproduce": "measure the papers' methods on the tiny world",
    "serve": "serve runs to OpenAI clients and on a page",
    "promote": "make a run the one that is served as `aligned`, if it passes the gate",
    "rollback": "go back to what was served as `aligned` before",
    "keys": "make, list and revoke the API keys of the endpoint",
    "report": "write report.html of a run anew",
    "doctor": "check what this machine has and lacks",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that the first argument names; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="raylign",
        description="Online preference alignment of multimodal language models on a Ray cluster.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="JOB", dest="job", required=True)
    for name, text in JOBS.items():
        commands.add_parser(name, help=text, add_help=False)
    if not arguments or arguments[0] not in JOBS:
        parser.parse_args(arguments)
        return 2
    import importlib

    return run(importlib.import_module(f"jobs.{arguments[0]}").main, arguments[1:])


def job_parser(
    job: str, description: str, config: "type[BaseModel] | None" = None, positional: bool = True
) -> argparse.ArgumentParser:
    """A parser for one job. One that reads a config documents its fields, and takes its file and overrides as the
    positional arguments unless it has others."""
    from jobs.config import describe_fields

    fields = "fields of the config:\n" + "\n".join(describe_fields(config)) + "\n\n" if config else ""
    parser = argparse.ArgumentParser(
        prog=f"raylign {job}",
        description=description,
        epilog=fields + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if config and positional:
        parser.add_argument("config", help="YAML file, for example one of jobs/configs")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a field of the config")
    return parser


def entry() -> None:
    """The console script. Modules of the current folder can be imported, as with `python -m`."""
    sys.path.insert(0, os.getcwd())
    leave(main())


def leave(code: int) -> NoReturn:
    """End the process. A thread that is still inside Ray would crash the interpreter while that shuts down, so then it
    is not given the time to; Ray sees that its driver is gone, and ends what it started for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(thread.name == LEARNER_THREAD for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)


def run(job: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a job; an error that a person can mend ends in its sentence and exit code, not in a traceback."""
    try:
        return job(arguments)
    except RaylignError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="raylign-error-", suffix=".log", delete=False) as file:
            traceback.print_exc(file=file)
        print(f"error: {describe(error)} (the whole trace: {file.name})", file=sys.stderr)
        return 1


if __name__ == "__main__":
    entry()
