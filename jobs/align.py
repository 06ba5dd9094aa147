"""`raylign align CONFIG [key=value …]`: the main job. Starts both halves of the loop, shows what happens, sums up."""

import functools
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connect import check_room, connect
from cluster.errors import ClusterError, DataError, RaylignError, describe, root_cause
from cluster.settings import located
from jobs.cli import LEARNER_THREAD, job_parser, leave, run
from jobs.config import check_same_settings, dump_config, load_config
from jobs.console import Console
from jobs.paths import places, run_address
from rl.config import AlignConfig
from rl.data import check_files
from rl.judges import collect_keys
from rl.policy import resolve_model
from rl.regimes import parts
from rl.store import Ending, RunFolder

if TYPE_CHECKING:
    from pydantic import SecretStr
    from ray.actor import ActorHandle

STOP_TIMEOUT_S = 600.0
START_TIMEOUT_S = 1800.0
FINISH_TIMEOUT_S = 3 * 3600.0
EVENTS_TIMEOUT_S = 600.0
SILENCE_TIMEOUT_S = 2 * 3600.0


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and align; returns the exit code."""
    parser = job_parser("align", "Align a model to preferences: online, offline, or both.", AlignConfig)
    parser.add_argument("--dry-run", action="store_true", help="print config, actors and outputs, then stop")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from the last checkpoint in run.dir")
    start.add_argument("--overwrite", action="store_true", help="replace the run in run.dir")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(AlignConfig, options.config, options.overrides)
    if options.dry_run:
        print(plan(config))
        return 0
    return align(config, resume=options.resume, overwrite=options.overwrite)


def plan(config: AlignConfig) -> str:
    """What a run with this config would start and write."""
    address = run_address(config.run.dir)
    roles = [
        f"  {role.count} x {role.name}: {role.resources.cpus:g} CPU, {role.resources.gpus:g} GPU, "
        f"{role.resources.threads} threads each"
        for role in config.roles
    ]
    samples = parts(config.pairs).needs_engines
    writes = [
        ("config.yaml", "the config above"),
        ("metrics.jsonl, tensorboard/", f"a row for each of {config.loop.steps} steps"),
        ("pairs/", "one Parquet file per step"),
        (
            "evaluations/",
            f"every {config.loop.eval_every} steps and at both ends" if samples else "none: nothing is sampled",
        ),
        ("checkpoints/", f"every {config.loop.checkpoint_every} steps, the newest {config.loop.checkpoints_kept} kept"),
        ("model/", "a PEFT adapter" if config.policy.lora else "a Hugging Face model folder"),
        ("summary.json, report.html, logs/", "results to read"),
    ]
    return "\n".join(
        [
            dump_config(config),
            f"model: {resolve_model(config.policy.model)}",
            "actors:",
            *roles,
            f"written to {address}:",
            *(f"  {name:34}{text}" for name, text in writes),
        ]
    )


def align(config: AlignConfig, resume: bool, overwrite: bool) -> int:
    """Run the loop to its end, or until it is stopped; returns the exit code."""
    console = Console()
    began = time.time()
    model = resolve_model(config.policy.model)
    placed = located(config, places())
    made = parts(placed.pairs)
    keys = collect_keys(config.judge) if made.needs_engines else {}
    check_files([*placed.data.files(), *(made.stored.files(made.section) if made.stored else ())])
    if made.stored:
        made.stored.check(made.section)
    folder = RunFolder(run_address(config.run.dir))
    first_step = 1
    if resume:
        folder.create(overwrite, resume)
        check_same_settings(folder.read_text("config.yaml"), config, folder.address)
        first_step = _resume_step(folder) + 1
        if first_step > config.loop.steps and folder.exists("summary.json"):
            console.say(f"nothing left to do: {folder.address} is at step {first_step - 1}; raise loop.steps to go on")
            return 0
    connect(config.cluster)
    check_room(config.roles)
    if not resume:
        folder.create(overwrite, resume)
    folder.write_text("config.yaml", dump_config(config))
    folder.set_state("running")
    console.say(f"run folder {folder.address}, seed {config.seed}, {config.loop.steps} steps")
    state: Ending = "failed"
    try:
        if resume:
            folder.cut_back(first_step - 1)
            console.say(f"resuming after step {first_step - 1}")
        alignment = _Run(placed, model, folder, first_step, console, began, keys)
        state = alignment.to_the_end()
    except (RaylignError, KeyboardInterrupt):
        raise
    except Exception as error:
        folder.write_text("logs/driver.log", traceback.format_exc())
        raise RaylignError(
            f"{describe(error)} (the whole trace: {folder.url('logs/driver.log')}; what is in the run folder is kept, "
            f"and --resume goes on from the last checkpoint)"
        ) from error
    finally:
        folder.set_state(state)
        if state == "failed" and not folder.exists("pairs"):
            folder.restore_replaced()
    if alignment.refusal is not None:
        raise alignment.refusal
    return 130 if state == "stopped" else 0


class _Run:
    """One run from the driver's side: starts both halves, watches them, stops them, sums up."""

    def __init__(
        self,
        config: AlignConfig,
        model: str,
        folder: RunFolder,
        first_step: int,
        console: Console,
        began: float,
        keys: "Mapping[str, SecretStr]",
    ):
        import ray

        from rl.loop import SamplingHalf

        self._config, self._model, self._folder, self._console, self._began = config, model, folder, console, began
        logs = Path(folder.path("logs")) if folder.is_local else Path(tempfile.gettempdir()) / "raylign-logs"
        self._logs = str(logs)
        self._first_step = first_step
        self._stop_requested = threading.Event()
        actor: Any = ray.remote(SamplingHalf).options(num_cpus=0, max_concurrency=1000)
        self._sampler: ActorHandle = actor.remote(config, model, folder.address, self._logs, first_step, keys)
        self._failure: BaseException | None = None
        self.refusal: RaylignError | None = None
        """Why no more pairs could be made, if that ended the run."""
        self._seen = 0
        self._heard_at = time.monotonic()

    def to_the_end(self) -> Ending:
        """Returns finished or stopped; raises what broke either half."""
        with _signals(self._request_stop):
            start, loop = self._sampler.start.remote(), self._sampler.run.remote()
            learner = threading.Thread(target=self._learn, args=(start,), name=LEARNER_THREAD, daemon=True)
            learner.start()
            self._watch(learner, [start, loop])
            results = self._finish()
        state: Ending = "stopped" if results["version"] < self._config.loop.steps else "finished"
        self._summarise(results, state)
        self.refusal = results["refusal"]
        return state

    def _learn(self, started: Any) -> None:
        """The learning half, under Ray Train; runs in a thread of the driver, for `fit` blocks."""
        try:
            self._fit(started)
        except BaseException as error:
            self._failure = error

    def _fit(self, started: Any) -> None:
        import ray
        from ray.train import CheckpointConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from rl.learner import LearnerTask, learn

        learner = self._config.learner
        on_gpu = learner.resources.gpus > 0
        resources = {"CPU": learner.resources.cpus} | ({"GPU": learner.resources.gpus} if on_gpu else {})
        task = LearnerTask(
            self._config,
            self._model,
            self._folder.address,
            self._logs,
            self._sampler,
            *ray.get(started, timeout=START_TIMEOUT_S),
        )
        self._folder.discard_replaced()
        TorchTrainer(
            learn,
            train_loop_config=task,
            scaling_config=ScalingConfig(num_workers=learner.workers, use_gpu=on_gpu, resources_per_worker=resources),
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            run_config=RunConfig(
                name="checkpoints",
                storage_path=self._folder.address,
                checkpoint_config=CheckpointConfig(num_to_keep=self._config.loop.checkpoints_kept),
            ),
        ).fit()

    def _watch(self, learner: threading.Thread, halves: list[Any]) -> None:
        import ray

        asked = False
        while learner.is_alive():
            if time.monotonic() - self._heard_at > SILENCE_TIMEOUT_S:
                raise ClusterError(
                    f"nothing has happened for {SILENCE_TIMEOUT_S / 3600:g} hours: a worker hangs or waits for "
                    f"resources; look at `ray status` and at the ends of the files in {self._logs}, then --resume"
                )
            if self._stop_requested.is_set() and not asked:
                asked = True
                self._console.say("stopping: the learner finishes its step, then saves (Ctrl-C again to abort)")
                self._unwrapped(lambda: ray.get(self._sampler.stop.remote(), timeout=STOP_TIMEOUT_S))
            self._show_events()
            done, halves = ray.wait(halves, num_returns=len(halves), timeout=0) if halves else ([], [])
            self._unwrapped(functools.partial(ray.get, done))
        if self._failure is not None:
            raise root_cause(self._failure)

    def _finish(self) -> dict[str, Any]:
        """What the sampling half ends with; its last evaluation may take as long as any."""
        import ray

        ending = self._sampler.finish.remote()
        deadline = time.monotonic() + FINISH_TIMEOUT_S
        while not ray.wait([ending], timeout=0)[0] and time.monotonic() < deadline:
            self._show_events()
        results: dict[str, Any] = self._unwrapped(lambda: ray.get(ending, timeout=1))
        self._show_events()
        return results

    def _show_events(self) -> None:
        import ray

        for event in self._unwrapped(
            lambda: ray.get(self._sampler.events.remote(self._seen), timeout=EVENTS_TIMEOUT_S)
        ):
            self._seen += 1
            self._heard_at = time.monotonic()
            self._console.show(event, self._config.loop.steps)

    def _request_stop(self) -> None:
        if self._stop_requested.is_set():
            raise KeyboardInterrupt
        self._stop_requested.set()

    def _summarise(self, results: dict[str, Any], state: str) -> None:
        from rl.report import write_report
        from rl.summary import summarise

        seconds = time.time() - self._began
        summary = summarise(self._config, self._folder, results, self._first_step, seconds)
        self._folder.write_json("summary.json", summary)
        write_report(self._folder)
        self._console.summary(summary, self._folder, state)

    @staticmethod
    def _unwrapped(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise root_cause(error) from None


def _resume_step(folder: RunFolder) -> int:
    """The step of the newest checkpoint; 0 if there is none but pairs are, which are used again."""
    from ray.train import Result

    try:
        result = Result.from_path(folder.url("checkpoints"))
    except Exception as error:
        if folder.steps():
            return 0
        raise DataError(
            f"run.dir: {folder.address} has no checkpoint to resume from; start anew with --overwrite"
        ) from error
    return int((result.metrics or {}).get("version", 0))


class _signals:
    """Ctrl-C and `ray job stop` ask the run to stop, while the block lasts."""

    def __init__(self, ask: Callable[[], None]):
        self._ask = ask

    def __enter__(self) -> None:
        self._before = {}
        with suppress(ValueError):  # not in the main thread: nobody to signal
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, lambda *_: self._ask())

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    leave(run(main, sys.argv[1:]))
