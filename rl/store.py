"""The run folder: everything a run writes, on a local disk or behind any fsspec address.

config.yaml        the resolved config
status.json        running, finished, stopped or failed
metrics.jsonl      one row per optimizer step
tensorboard/       the same rows as TensorBoard events
pairs/             step-00001.parquet and step-00001.json: the pairs of a step, and how they came about
judging.json       calls, tokens and cost of the judge so far
answers/           of `raylign annotate`: step-00001.parquet, a row per prompt with all answers and verdicts
evaluations/       version-00000.json: metrics, answers and verdicts on the held-out prompts
checkpoints/       Ray Train checkpoints of the learner
model/             the aligned model, a plain Hugging Face folder, or a PEFT adapter
summary.json       before, after, and what it took
bad-rows.jsonl     rows of the data that could not be used, and why
quality.json       of `raylign annotate`: what the pair set is like
report.html        all of it to look at
logs/              what each actor's libraries printed
"""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import fsspec

from cluster.errors import DataError
from rl.formats import Fault, counted
from rl.tables import Answers, read_answers, read_pairs, write_answers, write_pairs
from rl.types import PairBatch

BAD_ROWS = "bad-rows.jsonl"
Ending = Literal["finished", "stopped", "failed"]
"""How a run ended."""


class RunFolder:
    """Reads and writes one run folder. Only one process writes each file."""

    def __init__(self, address: str):
        """`address` is an absolute path or an fsspec URL such as s3://bucket/run."""
        self.address = address.rstrip("/")
        self.filesystem, self._root = fsspec.core.url_to_fs(self.address)
        self._listed_faults = False

    def path(self, name: str) -> str:
        """Where `name` lies, as the filesystem wants it."""
        return f"{self._root}/{name}"

    def url(self, name: str) -> str:
        """Where `name` lies, as a person wants it."""
        return f"{self.address}/{name}"

    @property
    def is_local(self) -> bool:
        return "file" in self.filesystem.protocol or self.filesystem.protocol == "file"

    def create(self, overwrite: bool, resume: bool) -> None:
        """Make the folder ready for a new run, or check that there is one to resume.

        A run that is replaced is set aside until `discard_replaced`, and comes back by `restore_replaced`. One that
        failed before its first answers has nothing to lose and is replaced without being asked.

        Raises:
            DataError: it is not empty and neither flag was given, it is no run folder, or there is nothing to resume.
        """
        is_run = self.exists("config.yaml") and self.exists("status.json")
        if is_run and (writer := self._writer()) is not None:
            raise DataError(f"run.dir: {self.address} is being written by process {writer}; stop that one first")
        if resume:
            if not is_run:
                raise DataError(f"run.dir: {self.address} has no run to resume; leave out --resume to start one")
            return
        if self.filesystem.exists(self._root) and self.filesystem.ls(self._root, detail=False):
            if not is_run:
                raise DataError(
                    f"run.dir: {self.address} is not empty and not a run folder (no config.yaml beside a status.json), "
                    f"so it is left alone; give another folder with run.dir=…"
                )
            empty = self.read_json("status.json")["state"] == "failed" and not (
                self.exists("pairs") or self.exists("answers")
            )
            if not overwrite and not empty:
                raise DataError(
                    f"run.dir: {self.address} is not empty; go on with it by --resume, replace it by --overwrite, "
                    f"or give another folder with run.dir=…"
                )
            self.discard_replaced()
            self.filesystem.mv(self._root, self._aside, recursive=True)
        self.filesystem.makedirs(self._root, exist_ok=True)

    def set_state(self, state: Literal["running"] | Ending) -> None:
        """Write status.json: how the run stands, and while it runs which process writes it."""
        import psutil

        me = psutil.Process()
        process = {"pid": me.pid, "host": platform.node(), "started": me.create_time()}
        self.write_json("status.json", {"state": state, **(process if state == "running" else {})})

    def _writer(self) -> int | None:
        """The id of another process of this machine that writes the folder."""
        import psutil

        status = self.read_json("status.json")
        if status["state"] != "running" or status["host"] != platform.node() or status["pid"] == os.getpid():
            return None
        with suppress(psutil.Error):
            if abs(psutil.Process(status["pid"]).create_time() - status["started"]) < 1:
                return int(status["pid"])
        return None

    def discard_replaced(self) -> None:
        """Delete the run that was set aside, if there is one."""
        if self.filesystem.exists(self._aside):
            self.filesystem.rm(self._aside, recursive=True)

    def restore_replaced(self) -> None:
        """Put the run that was set aside back in place of this one, if there is one; the list of bad rows stays."""
        if self.filesystem.exists(self._aside):
            listed = self.read_text(BAD_ROWS) if self.exists(BAD_ROWS) else None
            self.filesystem.rm(self._root, recursive=True)
            self.filesystem.mv(self._aside, self._root, recursive=True)
            if listed is not None:
                self.write_text(BAD_ROWS, listed)

    @property
    def _aside(self) -> str:
        return f"{self._root}.replaced"

    def write_spent(self, spent: Mapping[str, float]) -> None:
        """Keep what judging took so far; see `Judge.spent`."""
        self.write_json("judging.json", dict(spent))

    def read_spent(self) -> dict[str, float]:
        """What judging took so far; nothing before the first call."""
        return self.read_json("judging.json") if self.exists("judging.json") else {}

    def exists(self, name: str) -> bool:
        return bool(self.filesystem.exists(self.path(name)))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all."""
        path = self.path(name)
        self.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        if not self.is_local:  # object stores write whole files anyway
            self.filesystem.pipe_file(path, content)
            return
        self.filesystem.pipe_file(f"{path}.part", content)
        os.replace(f"{path}.part", path)

    def read_text(self, name: str) -> str:
        """A file's text.

        Raises:
            DataError: there is no such file.
        """
        if not self.exists(name):
            raise DataError(f"{self.url(name)} does not exist; is {self.address} a finished run folder?")
        return bytes(self.filesystem.cat_file(self.path(name))).decode()

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, _json(value, indent=1))

    def read_json(self, name: str) -> Any:
        """The file's value.

        Raises:
            DataError: there is no such file.
        """
        return json.loads(self.read_text(name))

    def append_row(self, name: str, row: dict[str, Any]) -> None:
        """Add one JSON line. Object stores cannot append, so there the file is written anew."""
        self._append(name, [row])

    def list_faults(self, faults: Sequence[Fault]) -> str:
        """Add rows of the data that cannot be used to bad-rows.jsonl; returns a sentence that says so.

        The first call of a process begins the file anew, for the data may have been mended since.
        """
        if not self._listed_faults:
            self._listed_faults = True
            self.write_text(BAD_ROWS, "")
        self._append(BAD_ROWS, map(asdict, faults))
        return f"{counted(len(faults), 'row')} cannot be used; {self.url(BAD_ROWS)} lists them"

    def _append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        lines = b"".join(map(_json, rows))
        if self.is_local:
            with self.filesystem.open(self.path(name), "ab") as file:
                file.write(lines)
        else:
            before = self.filesystem.cat_file(self.path(name)) if self.exists(name) else b""
            self.write_bytes(name, before + lines)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All rows of a JSON-lines file; none if it does not exist."""
        if not self.exists(name):
            return []
        *lines, _cut_off = self.read_text(name).split("\n")
        return [json.loads(line) for line in lines]  # a last line without its end was cut off by a crash

    def cut_back(self, step: int) -> None:
        """Drop rows and evaluations of steps after `step`, which a resumed run makes again; pairs stay, to be used."""
        for name in ("metrics.jsonl", "publications.jsonl"):
            if rows := self.rows(name):
                self.write_bytes(name, b"".join(_json(row) for row in rows if row["step"] <= step))
        for evaluation in read_evaluations(self):
            if evaluation["version"] > step:
                self.filesystem.rm(self.path(evaluation_file(evaluation["version"])))

    def upload(self, folder: Path, name: str) -> None:
        """Copy a local folder into the run folder, replacing what was there."""
        if self.exists(name):
            self.filesystem.rm(self.path(name), recursive=True)
        self.filesystem.makedirs(self.path(name), exist_ok=True)
        for path in folder.rglob("*"):
            if path.is_file():
                target = f"{self.path(name)}/{path.relative_to(folder).as_posix()}"
                self.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
                self.filesystem.put_file(str(path), target)

    def write_batch(self, batch: PairBatch) -> None:
        """Store a step's pairs. The JSON beside the Parquet comes last and marks the step as complete."""
        name = f"pairs/step-{batch.step:05d}"
        self.filesystem.makedirs(self.path("pairs"), exist_ok=True)
        write_pairs(batch.pairs, self.filesystem, self.path(f"{name}.parquet"))
        info = {key: value for key, value in asdict(batch).items() if key != "pairs"}
        self.write_json(f"{name}.json", info)

    def read_batch(self, step: int) -> PairBatch | None:
        """A stored step, or None if it was not completely written."""
        name = f"pairs/step-{step:05d}"
        if not self.exists(f"{name}.json"):
            return None
        pairs = tuple(read_pairs(self.filesystem, self.path(f"{name}.parquet")))
        return PairBatch(pairs=pairs, **self.read_json(f"{name}.json"))

    def write_answers(self, step: int, answers: Sequence[Answers]) -> None:
        """Store a step's answers, judged or not yet."""
        self.filesystem.makedirs(self.path("answers"), exist_ok=True)
        write_answers(answers, self.filesystem, self.path(f"answers/step-{step:05d}.parquet"))

    def read_answers(self, step: int) -> list[Answers] | None:
        """A step's answers; None if they were not, or not completely, written."""
        name = f"answers/step-{step:05d}.parquet"
        if not self.exists(name):
            return None
        try:
            return read_answers(self.filesystem, self.path(name))
        except (OSError, ValueError):  # cut off by a crash
            return None

    def steps(self) -> list[int]:
        """Numbers of the steps whose pairs are complete."""
        names = self.filesystem.glob(self.path("pairs/step-*.json"))
        return sorted(int(name.rpartition("-")[2].removesuffix(".json")) for name in names)


def _json(value: Any, indent: int | None = None) -> bytes:
    """As a person reads it; half a character, which UTF-8 cannot have, is escaped."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def evaluation_file(version: int) -> str:
    """Where the evaluation of a policy version lies in the run folder."""
    return f"evaluations/version-{version:05d}.json"


def read_evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """All evaluations of a run in the order of their policy versions."""
    names = folder.filesystem.glob(folder.path("evaluations/version-*.json"))
    return [folder.read_json(f"evaluations/{name.rpartition('/')[2]}") for name in sorted(names)]
