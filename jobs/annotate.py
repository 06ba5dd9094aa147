"""`raylign annotate CONFIG [key=value …]`: a model's own answers, judged and made into pairs."""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster.connect import check_room, connect
from cluster.errors import JudgeError, root_cause
from cluster.settings import located
from jobs.cli import job_parser, run
from jobs.config import check_same_settings, dump_config, load_config
from jobs.paths import places, run_address
from rl.annotate import AnnotateConfig, Annotation, totals
from rl.data import check_files
from rl.formats import Fault
from rl.judges import collect_keys
from rl.policy import resolve_model
from rl.store import Ending, RunFolder
from rl.types import PairBatch


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and annotate; returns the exit code."""
    parser = job_parser("annotate", "Sample a model's answers, have them judged, and make pairs.", AnnotateConfig)
    parser.add_argument("--dry-run", action="store_true", help="print the config and the actors, then stop")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on with the run in run.dir")
    start.add_argument("--overwrite", action="store_true", help="replace the run in run.dir")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(AnnotateConfig, options.config, options.overrides)
    if options.dry_run:
        print(dump_config(config))
        for role in config.roles:
            print(f"{role.count} x {role.name}: {role.resources.cpus:g} CPU, {role.resources.gpus:g} GPU")
        return 0
    return annotate(config, options.resume, options.overwrite)


def annotate(config: AnnotateConfig, resume: bool, overwrite: bool) -> int:
    """Annotate to the end, or until it is stopped; returns the exit code."""
    model = resolve_model(config.policy.model)
    keys = collect_keys(config.judge) if config.parts.sampled else {}
    placed = located(config, places())
    check_files(placed.data.files())
    folder = RunFolder(run_address(config.run.dir))
    if resume:
        folder.create(overwrite, resume)
        check_same_settings(folder.read_text("config.yaml"), config, folder.address)
        if folder.read_json("status.json")["state"] == "finished":
            print(f"nothing left to do: {folder.address} is annotated")
            _show(folder)
            return 0
    connect(config.cluster)
    check_room(config.roles)
    if not resume:
        folder.create(overwrite, resume)
    folder.write_text("config.yaml", dump_config(config))
    folder.set_state("running")
    print(f"run folder {folder.address}, seed {config.seed}", flush=True)
    logs = Path(folder.path("logs")) if folder.is_local else Path(tempfile.mkdtemp(prefix="raylign-logs-"))

    def report(faults: Sequence[Fault]) -> None:
        print(f"warning: {folder.list_faults(faults)}", flush=True)

    state: Ending = "failed"
    try:
        annotation = Annotation(placed, model, folder, logs, keys, report)
        folder.discard_replaced()
        held = f"; {annotation.held_out} held out are left alone" if annotation.held_out else ""
        print(f"{len(annotation.prompts)} prompts to annotate{held}", flush=True)
        complete = asyncio.run(_run(annotation))
        state = "finished" if complete else "stopped"
    except Exception as error:
        raise root_cause(error) from None
    finally:
        folder.set_state(state)
        if folder.steps():
            _show(folder)
        folder.restore_replaced()
    if not complete:
        print("stopped; go on from here with --resume")
    return 0 if complete else 130


async def _run(annotation: Annotation) -> bool:
    from tqdm import tqdm

    loop = asyncio.get_running_loop()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if stopped:
            os._exit(130)
        stopped = True
        tqdm.write("stopping: replies that are under way are still taken (Ctrl-C again to abort)")
        annotation.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    batches: list[PairBatch] = []
    with tqdm(total=len(annotation.prompts), unit="prompt", file=sys.stdout, mininterval=0.5) as bar:

        def progress(batch: PairBatch) -> None:
            batches.append(batch)
            sums = totals(batches)
            shown = {name: sums.get(name, 0) for name in ("pairs", "ties", "abstentions")}
            shown |= {name: sums.get(f"judge_{name}", 0) for name in ("calls", "cached")}
            bar.set_postfix(shown | {"cost": f"{annotation.judge.cost:.4f}"}, refresh=False)
            bar.update(batch.counts["prompts"])

        try:
            return await annotation.run(progress)
        except JudgeError:
            if stopped:
                return False
            raise


def _show(folder: RunFolder) -> None:
    from rl.quality import write_quality

    result = write_quality(folder)
    print(
        f"{result['pairs']} pairs from {result['prompts']} prompts; {result['ties']} ties, {result['identical']} "
        f"identical, {result['unjudged']} unjudged, {result['abstentions']} abstentions; "
        f"cost {result['judge']['cost']:.4f}"
    )
    for name in ("report.html", "quality.json", "pairs"):
        print(f"    {name:14} {folder.url(name)}")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
