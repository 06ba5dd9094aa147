"""`raylign promote RUN`: make a run the one behind the name `aligned`, if it is good enough."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cluster.errors import DataError
from jobs.cli import job_parser, run
from jobs.config import load_config
from jobs.paths import run_address
from jobs.serve import announce, parse, register
from rl.config import AlignConfig
from rl.store import RunFolder
from serve.gate import Verdict, compare
from serve.settings import GateSettings, PromoteSettings
from serve.versions import Candidate, RegistryFile


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, judge the run, change the registry and wait for the server; returns the exit code."""
    parser = job_parser(
        "promote", "Make a run the one behind the name `aligned`: here, and in a server that is running. It must pass "
        "the gate: against the serving version, on the prompts that both held out.", PromoteSettings, positional=False,
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="promote it whatever the gate says; the verdict is kept")
    parser.add_argument("--canary", type=float, metavar="SHARE", help="only give it this share of the traffic, 0 to 1")
    options, settings = parse(parser, arguments)
    if len(options.runs) != 1:
        parser.error("give the folder of one run")
    if options.canary is not None and not 0 <= options.canary <= 1:
        parser.error("--canary must be from 0 to 1")
    file = RegistryFile(settings.dir)
    folder = run_address(options.runs[0])
    file.read()  # where nothing is served nothing is left behind
    with file.locked():
        before = file.read()
        changed, version = register(before, folder)
        if options.canary == 0 and before.candidate is None:
            raise DataError("there is no canary to end")
        if options.canary == 0:
            file.write(replace(changed, candidate=None), "canary", version=version.name, share=0)
        elif version == before.aligned:
            print(f"{version.name} is aligned already")
            return 0
        else:
            verdict = judged(folder, before.aligned.run, settings.gate)
            told = {
                "version": version.name, "against": before.aligned.name, "verdict": verdict.figures,
                "limits": settings.gate.model_dump(), "passed": verdict.passed,
            }  # fmt: skip
            if not verdict.passed and not options.force:
                file.log("refused", **told)
                raise DataError(
                    f"{version.name} is not promoted: against {before.aligned.name}, {'; '.join(verdict.faults)}; "
                    f"--force overrides the gate"
                )
            forced = "" if verdict.passed else "; --force overrides it"
            print(f"{verdict}, against {before.aligned.name}{forced}")
            if options.canary:
                wanted = replace(changed, candidate=Candidate(version.name, options.canary))
                file.write(wanted, "canary", share=options.canary, **told)
            else:
                file.write(changed.promote(version.name), "promoted", **told)
    return announce(file, before)


def judged(run: str, serving: str, settings: GateSettings) -> Verdict:
    """The gate's verdict on a run, by its folder, against the one that is served."""
    config = load_config(AlignConfig, str(Path(run) / "config.yaml"), [])
    return compare(config, RunFolder(run), RunFolder(serving), settings)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
