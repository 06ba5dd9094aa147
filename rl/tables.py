"""Pairs and judged answers as Parquet, written through `datasets` so that images stay images."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster.errors import DataError
from rl.images import CanonicalImage, canonicalise
from rl.render import written_completion
from rl.types import Attributes, Completion, Extra, Judgement, Pair, PairValues, Prompt

if TYPE_CHECKING:
    from transformers import ProcessorMixin

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Answers:
    """A prompt with all its completions, and what the judge said of each; None before it did."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    judgements: tuple[Judgement, ...] | None = None

    def with_reference(self, processor: "ProcessorMixin") -> "Answers":
        """With the prompt's reference answer, if it has one, as a further completion."""
        if not self.prompt.reference_answer:
            return self
        written = written_completion(self.prompt, self.prompt.reference_answer, processor)
        return replace(self, completions=(*self.completions, written))


def write_pairs(pairs: Sequence[Pair], filesystem: Any, path: str) -> None:
    """Write pairs as a preference set that TRL and others read: prompt, chosen, rejected, images.

    Further columns, prefixed by their side, hold the tokens, scores and provenance.
    """
    _write([_pair_row(pair) for pair in pairs], _pair_features(), filesystem, path)


def read_pairs(filesystem: Any, path: str) -> Iterator[Pair]:
    """The pairs of a file that `write_pairs` made, equal to those that were written.

    Raises:
        DataError: another version of raylign wrote it.
    """
    rows = _read(filesystem, path)
    if rows and (missing := sorted(_pair_features().keys() - rows[0].keys())):
        raise DataError(f"{path} lacks the columns {', '.join(missing[:3])}: make the pairs anew with this version")
    return map(_pair, rows)


def write_trl(pairs: Sequence[Pair], filesystem: Any, path: str) -> None:
    """Write pairs with TRL's own columns and nothing else."""
    features = _pair_features()
    columns = ("prompt", "chosen", "rejected", "images")
    rows = [{name: row[name] for name in columns} for row in map(_pair_row, pairs)]
    _write(rows, type(features)({name: features[name] for name in columns}), filesystem, path)


def write_answers(answers: Sequence[Answers], filesystem: Any, path: str) -> None:
    """Write one row per prompt, its completions and judgements as lists."""
    _write([_answers_row(one) for one in answers], _answers_features(), filesystem, path)


def read_answers(filesystem: Any, path: str) -> list[Answers]:
    """The rows of a file that `write_answers` made."""
    return [_answers(row) for row in _read(filesystem, path)]


def _write(rows: list[dict[str, Any]], features: Any, filesystem: Any, path: str) -> None:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    with filesystem.open(path, "wb") as file:
        columns = {name: [row[name] for row in rows] for name in features}
        Dataset.from_dict(columns, features=features).to_parquet(file)


def _read(filesystem: Any, path: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    with filesystem.open(path, "rb") as file:
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    return rows


# Prompts.


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    return {
        "prompt": list(prompt.messages),
        "images": [{"bytes": image.png, "path": None} for image in prompt.images],
        "prompt_id": prompt.id,
        "prompt_source": prompt.source,
        "reference_answer": prompt.reference_answer,
        "truth": None if prompt.truth is None else json.dumps(prompt.truth),
    }


def _prompt(row: dict[str, Any]) -> Prompt:
    messages = [
        {**turn, "content": [{k: v for k, v in part.items() if v is not None} for part in turn["content"]]}
        for turn in row["prompt"]
    ]
    return Prompt(
        id=row["prompt_id"],
        messages=tuple(messages),
        images=tuple(_stored_image(image["bytes"]) for image in row["images"]),
        reference_answer=row["reference_answer"],
        truth=None if row["truth"] is None else json.loads(row["truth"]),
        source=row["prompt_source"],
    )


def _prompt_features() -> dict[str, Any]:
    from datasets import Image, List, Value

    return {
        "prompt": _messages_feature(),
        "images": List(Image()),
        "prompt_id": Value("string"),
        "prompt_source": Value("string"),
        "reference_answer": Value("string"),
        "truth": Value("string"),
    }


def _messages_feature() -> Any:
    from datasets import List, Value

    parts = List({"type": Value("string"), "text": Value("string")})
    return List({"role": Value("string"), "content": parts})


def _stored_image(png: bytes) -> CanonicalImage:
    """A canonical image that was stored; canonicalising changes nothing, so its digest is the same."""
    return canonicalise(png, "stored image")


# Completions with their judgements.


def _completion_row(completion: Completion, judgement: Judgement | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "token_ids": list(completion.token_ids),
        "sampler_logps": list(completion.logps),
        "finish_reason": completion.finish_reason,
    }
    if judgement is None:
        return row | {"score": None, "attributes": None, "reason": None}
    attributes = None if judgement.attributes is None else list(judgement.attributes)
    return row | {"score": judgement.score, "attributes": attributes, "reason": judgement.reason}


def _completion(row: dict[str, Any], text: str, prompt_id: str, prompt_token_ids: Any, version: int) -> Completion:
    return Completion(
        prompt_id=prompt_id,
        prompt_token_ids=tuple(prompt_token_ids),
        token_ids=tuple(row["token_ids"]),
        text=text,
        logps=tuple(row["sampler_logps"]),
        policy_version=version,
        finish_reason=row["finish_reason"],
    )


def _judgement(row: dict[str, Any], judge: str, prompt_hash: str) -> Judgement:
    attributes = None if row["attributes"] is None else Attributes(*row["attributes"])
    return Judgement(row["score"], attributes, row["reason"], judge, prompt_hash)


def _completion_features() -> dict[str, Any]:
    from datasets import List, Value

    return {
        "token_ids": List(Value("int32")),
        "sampler_logps": List(Value("float64")),
        "finish_reason": Value("string"),
        "score": Value("float64"),
        "attributes": List(Value("int32")),
        "reason": Value("string"),
    }


# Pairs.


def _pair_row(pair: Pair) -> dict[str, Any]:
    row = _prompt_row(pair.prompt) | {
        "prompt_token_ids": list(pair.completions.chosen.prompt_token_ids),
        "margin": pair.margin,
        "source": pair.source,
        "policy_version": pair.policy_version,
        "reference_version": pair.reference_version,
        "label_noise": pair.label_noise,
        "weight": pair.weight,
        "extras": [_extra_row(extra) for extra in pair.extras],
        "judge": pair.judgements.chosen.judge,
        "judge_prompt_hash": pair.judgements.chosen.prompt_hash,
    }
    for index, side in enumerate(SIDES):
        completion = pair.completions[index]
        row[side] = [{"role": "assistant", "content": [{"type": "text", "text": completion.text}]}]
        row[f"{side}_reference_logps"] = None if pair.reference_logps is None else list(pair.reference_logps[index])
        for name, value in _completion_row(completion, pair.judgements[index]).items():
            row[f"{side}_{name}"] = value
    return row


def _pair(row: dict[str, Any]) -> Pair:
    completions, judgements = [], []
    for side in SIDES:
        part = {name: row[f"{side}_{name}"] for name in _completion_columns()}
        text = row[side][0]["content"][0]["text"]
        completions.append(_completion(part, text, row["prompt_id"], row["prompt_token_ids"], row["policy_version"]))
        judgements.append(_judgement(part, row["judge"], row["judge_prompt_hash"]))
    scored = row["chosen_reference_logps"] is not None
    return Pair(
        prompt=_prompt(row),
        completions=PairValues(*completions),
        judgements=PairValues(*judgements),
        margin=row["margin"],
        source=row["source"],
        policy_version=row["policy_version"],
        reference_logps=PairValues(*(tuple(row[f"{side}_reference_logps"]) for side in SIDES)) if scored else None,
        reference_version=row["reference_version"],
        label_noise=row["label_noise"],
        weight=row["weight"],
        extras=tuple(_extra(part, row["prompt_id"], row["policy_version"]) for part in row["extras"]),
    )


def _extra_row(extra: Extra) -> dict[str, Any]:
    return _completion_row(extra.completion, None) | {
        "role": extra.role,
        "text": extra.completion.text,
        "prompt_token_ids": list(extra.completion.prompt_token_ids),
        "reference_logps": None if extra.reference_logps is None else list(extra.reference_logps),
    }


def _extra(row: dict[str, Any], prompt_id: str, version: int) -> Extra:
    logps = row["reference_logps"]
    completion = _completion(row, row["text"], prompt_id, row["prompt_token_ids"], version)
    return Extra(row["role"], completion, None if logps is None else tuple(logps))


def _completion_columns() -> tuple[str, ...]:
    return ("token_ids", "sampler_logps", "finish_reason", "score", "attributes", "reason")


def _pair_features() -> Any:
    from datasets import Features, List, Value

    features = _prompt_features() | {
        "prompt_token_ids": List(Value("int32")),
        "margin": Value("float64"),
        "source": Value("string"),
        "policy_version": Value("int64"),
        "reference_version": Value("string"),
        "label_noise": Value("float64"),
        "weight": Value("float64"),
        "extras": List(
            _completion_features()
            | {
                "role": Value("string"),
                "text": Value("string"),
                "prompt_token_ids": List(Value("int32")),
                "reference_logps": List(Value("float64")),
            }
        ),
        "judge": Value("string"),
        "judge_prompt_hash": Value("string"),
    }
    for side in SIDES:
        features |= {side: _messages_feature(), f"{side}_reference_logps": List(Value("float64"))}
        features |= {f"{side}_{name}": feature for name, feature in _completion_features().items()}
    return Features(features)


# Answers.


def _answers_row(answers: Answers) -> dict[str, Any]:
    judgements = answers.judgements or (None,) * len(answers.completions)
    first = answers.judgements[0] if answers.judgements else None
    return _prompt_row(answers.prompt) | {
        "prompt_token_ids": list(answers.completions[0].prompt_token_ids),
        "policy_version": answers.completions[0].policy_version,
        "judge": first.judge if first else None,
        "judge_prompt_hash": first.prompt_hash if first else None,
        "answers": [
            {"text": one.text} | _completion_row(one, judgement)
            for one, judgement in zip(answers.completions, judgements, strict=True)
        ],
    }


def _answers(row: dict[str, Any]) -> Answers:
    completions = tuple(
        _completion(part, part["text"], row["prompt_id"], row["prompt_token_ids"], row["policy_version"])
        for part in row["answers"]
    )
    judged = row["judge"] is not None
    judgements = tuple(_judgement(part, row["judge"], row["judge_prompt_hash"]) for part in row["answers"])
    return Answers(_prompt(row), completions, judgements if judged else None)


def _answers_features() -> Any:
    from datasets import Features, List, Value

    return Features(
        _prompt_features()
        | {
            "prompt_token_ids": List(Value("int32")),
            "policy_version": Value("int64"),
            "judge": Value("string"),
            "judge_prompt_hash": Value("string"),
            "answers": List({"text": Value("string")} | _completion_features()),
        }
    )
