"""The run folder: everything a run writes, on a local disk or behind any fsspec address.

config.yaml        the resolved config
status.json        running, finished, stopped or failed
metrics.jsonl      one row per optimizer step
tensorboard/       the same rows as TensorBoard events
pairs/             step-00001.parquet and step-00001.json: the pairs of a step, and how they came about
evaluations/       version-00000.json: metrics, answers and verdicts on the held-out prompts
checkpoints/       Ray Train checkpoints of the learner
model/             the aligned model, a plain Hugging Face folder, or a PEFT adapter
summary.json       before, after, and what it took
report.html        all of it to look at
logs/              what each actor's libraries printed
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec

from cluster.errors import DataError
from rl.images import CanonicalImage, canonicalise
from rl.types import Attributes, Completion, Judgement, Pair, PairBatch, PairValues, Prompt


class RunFolder:
    """Reads and writes one run folder. Only one process writes each file."""

    def __init__(self, address: str):
        """`address` is an absolute path or an fsspec URL such as s3://bucket/run."""
        self.address = address.rstrip("/")
        self.filesystem, self._root = fsspec.core.url_to_fs(self.address)

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

        A run that failed before its first pairs has nothing to lose and is replaced without being asked.

        Raises:
            DataError: it is not empty and neither flag was given, or there is nothing to resume.
        """
        exists = self.filesystem.exists(self._root) and bool(self.filesystem.ls(self._root, detail=False))
        if resume:
            if not self.exists("config.yaml"):
                raise DataError(f"run.dir: {self.address} has no run to resume; leave out --resume to start one")
            return
        began = exists and (self.exists("pairs") or not self.exists("config.yaml"))
        if began and not overwrite:
            raise DataError(
                f"run.dir: {self.address} is not empty; go on with it by --resume, replace it by --overwrite, "
                f"or give another folder with run.dir=…"
            )
        if exists:
            if not self.exists("config.yaml"):
                raise DataError(
                    f"run.dir: {self.address} is not a run folder (no config.yaml), so --overwrite leaves it alone"
                )
            self.filesystem.rm(self._root, recursive=True)
        self.filesystem.makedirs(self._root, exist_ok=True)

    def exists(self, name: str) -> bool:
        return bool(self.filesystem.exists(self.path(name)))

    def write_bytes(self, name: str, content: bytes) -> None:
        self.filesystem.makedirs(self.path(name).rpartition("/")[0], exist_ok=True)
        self.filesystem.pipe_file(self.path(name), content)

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """The file's value.

        Raises:
            DataError: there is no such file.
        """
        if not self.exists(name):
            raise DataError(f"{self.url(name)} does not exist; is {self.address} a finished run folder?")
        with self.filesystem.open(self.path(name), encoding="utf-8") as file:
            return json.load(file)

    def append_row(self, name: str, row: dict[str, Any]) -> None:
        """Add one JSON line. Object stores cannot append, so there the file is written anew."""
        line = json.dumps(row) + "\n"
        if self.is_local:
            with self.filesystem.open(self.path(name), "a", encoding="utf-8") as file:
                file.write(line)
        else:
            before = self.filesystem.cat_file(self.path(name)).decode() if self.exists(name) else ""
            self.write_text(name, before + line)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All rows of a JSON-lines file; none if it does not exist."""
        if not self.exists(name):
            return []
        with self.filesystem.open(self.path(name), encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def cut_back(self, step: int) -> None:
        """Drop rows and evaluations of steps after `step`, which a resumed run makes again; pairs stay, to be used."""
        for name in ("metrics.jsonl", "publications.jsonl"):
            if rows := self.rows(name):
                self.write_text(name, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
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


def evaluation_file(version: int) -> str:
    """Where the evaluation of a policy version lies in the run folder."""
    return f"evaluations/version-{version:05d}.json"


def read_evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """All evaluations of a run in the order of their policy versions."""
    names = folder.filesystem.glob(folder.path("evaluations/version-*.json"))
    return [folder.read_json(f"evaluations/{name.rpartition('/')[2]}") for name in sorted(names)]


def write_pairs(pairs: tuple[Pair, ...], filesystem: Any, path: str) -> None:
    """Write pairs as a preference set that TRL and others read: prompt, chosen, rejected, images.

    Further columns, prefixed by their side, hold the tokens, scores and provenance.
    """
    from datasets import Dataset

    dataset = Dataset.from_list([_to_row(pair) for pair in pairs], features=_features())
    with filesystem.open(path, "wb") as file:
        dataset.to_parquet(file)


def read_pairs(filesystem: Any, path: str) -> Iterator[Pair]:
    """The pairs of a file that `write_pairs` made, equal to those that were written."""
    import pyarrow.parquet as parquet

    with filesystem.open(path, "rb") as file:
        rows = parquet.read_table(file).to_pylist()
    return map(_from_row, rows)


SIDES = ("chosen", "rejected")


def _to_row(pair: Pair) -> dict[str, Any]:
    prompt = pair.prompt
    row: dict[str, Any] = {
        "prompt": list(prompt.messages),
        "images": [{"bytes": image.png, "path": None} for image in prompt.images],
        "prompt_id": prompt.id,
        "prompt_token_ids": list(pair.completions.chosen.prompt_token_ids),
        "reference_answer": prompt.reference_answer,
        "truth": None if prompt.truth is None else json.dumps(prompt.truth),
        "margin": pair.margin,
        "source": pair.source,
        "policy_version": pair.policy_version,
        "reference_version": pair.reference_version,
        "label_noise": pair.label_noise,
    }
    for index, side in enumerate(SIDES):
        completion, judgement = pair.completions[index], pair.judgements[index]
        row |= {
            side: [{"role": "assistant", "content": [{"type": "text", "text": completion.text}]}],
            f"{side}_token_ids": list(completion.token_ids),
            f"{side}_sampler_logps": list(completion.logps),
            f"{side}_finish_reason": completion.finish_reason,
            f"{side}_score": judgement.score,
            f"{side}_attributes": None if judgement.attributes is None else list(judgement.attributes),
            f"{side}_reason": judgement.reason,
            f"{side}_reference_logp": None if pair.reference_logps is None else pair.reference_logps[index],
        }
    row["judge"] = pair.judgements.chosen.judge
    row["judge_prompt_hash"] = pair.judgements.chosen.prompt_hash
    return row


def _from_row(row: dict[str, Any]) -> Pair:
    images = tuple(_stored_image(image["bytes"]) for image in row["images"])
    messages = [
        {**turn, "content": [{k: v for k, v in part.items() if v is not None} for part in turn["content"]]}
        for turn in row["prompt"]
    ]
    truth = None if row["truth"] is None else json.loads(row["truth"])
    prompt = Prompt(row["prompt_id"], tuple(messages), images, row["reference_answer"], truth)
    completions, judgements = [], []
    for side in SIDES:
        completions.append(
            Completion(
                prompt_id=prompt.id,
                prompt_token_ids=tuple(row["prompt_token_ids"]),
                token_ids=tuple(row[f"{side}_token_ids"]),
                text=row[side][0]["content"][0]["text"],
                logps=tuple(row[f"{side}_sampler_logps"]),
                policy_version=row["policy_version"],
                finish_reason=row[f"{side}_finish_reason"],
            )
        )
        grades = row[f"{side}_attributes"]
        attributes = None if grades is None else Attributes(*grades)
        judgements.append(
            Judgement(row[f"{side}_score"], attributes, row[f"{side}_reason"], row["judge"], row["judge_prompt_hash"])
        )
    scored = row["chosen_reference_logp"] is not None
    return Pair(
        prompt=prompt,
        completions=PairValues(*completions),
        judgements=PairValues(*judgements),
        margin=row["margin"],
        source=row["source"],
        policy_version=row["policy_version"],
        reference_logps=PairValues(*(row[f"{side}_reference_logp"] for side in SIDES)) if scored else None,
        reference_version=row["reference_version"],
        label_noise=row["label_noise"],
    )


def _stored_image(png: bytes) -> CanonicalImage:
    """A canonical image that was stored; canonicalising changes nothing, so its digest is the same."""
    return canonicalise(png, "stored image")


def _features() -> Any:
    from datasets import Features, Image, List, Value

    parts = List({"type": Value("string"), "text": Value("string")})
    messages = List({"role": Value("string"), "content": parts})
    features = {
        "prompt": messages,
        "images": List(Image()),
        "prompt_id": Value("string"),
        "prompt_token_ids": List(Value("int32")),
        "reference_answer": Value("string"),
        "truth": Value("string"),
        "margin": Value("float64"),
        "source": Value("string"),
        "policy_version": Value("int64"),
        "reference_version": Value("string"),
        "label_noise": Value("float64"),
        "judge": Value("string"),
        "judge_prompt_hash": Value("string"),
    }
    for side in SIDES:
        features |= {
            side: messages,
            f"{side}_token_ids": List(Value("int32")),
            f"{side}_sampler_logps": List(Value("float64")),
            f"{side}_finish_reason": Value("string"),
            f"{side}_score": Value("float64"),
            f"{side}_attributes": List(Value("int32")),
            f"{side}_reason": Value("string"),
            f"{side}_reference_logp": Value("float64"),
        }
    return Features(features)
