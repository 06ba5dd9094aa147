"""What happened in a run: rows for the run folder, events for whoever watches."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rl.evaluation import Answer, BaseAnswer, stored_answers
from rl.store import RunFolder, evaluation_file, read_evaluations
from rl.types import PairBatch

WATCH_S = 1.0
COUNTS = ("prompts", "completions", "tokens", "pairs", "ties", "identical", "unjudged", "abstentions", "too_long")
PHASES = ("sampling", "judging", "reference")
GALLERY_IMAGES = 64


class Journal:
    """Collects metrics of both halves, writes one row per step, and keeps events for the driver to read."""

    def __init__(self, store: RunFolder):
        self._store = store
        self._events: list[dict[str, Any]] = []
        self._new = asyncio.Event()
        self._closed = False
        self._began = time.perf_counter()
        self._pending: dict[str, float] = {}
        self._tensorboard = _tensorboard(store)
        self.startup: dict[str, float] = {}
        self.last_evaluated = max((one["version"] for one in read_evaluations(store)), default=-1)

    @property
    def age(self) -> float:
        """Seconds since the journal was opened."""
        return time.perf_counter() - self._began

    def note(self, _group: str, **seconds: float) -> None:
        """Record how long a part of the start-up took; the first value of each name stays."""
        for name, value in seconds.items():
            if name not in self.startup:
                self.startup[name] = round(value, 2)
                self._emit("startup", {"part": name, "seconds": value})

    def published(self, version: int, metrics: dict[str, float]) -> None:
        """The engines hold `version`: one row of publications.jsonl."""
        self.note("startup", first_publication=self.age)
        self._store.append_row("publications.jsonl", {"step": version, **metrics})
        self._emit("published", {"version": version, **metrics})

    def updated(self, version: int, metrics: dict[str, float], batch: PairBatch) -> None:
        """The learner made `version` from `batch`: one row of metrics.jsonl."""
        counts = dict.fromkeys(COUNTS, 0) | batch.counts
        seconds = {f"seconds_{name}": batch.seconds.get(name, 0.0) for name in PHASES}
        lengths = [len(one.token_ids) for pair in batch.pairs for one in pair.completions]
        judging = {f"judge_{name}": value for name, value in batch.judging.items()}
        row = {
            "step": version,
            "policy_version": version,
            **metrics,
            **counts,
            **judging,
            **seconds,
            "mean_length": counts["tokens"] / max(1, counts["completions"]),
            "pair_length": sum(lengths) / max(1, len(lengths)),
            "tokens_per_second": counts["tokens"] / max(1e-9, batch.seconds.get("sampling", 0)),
            "margin": sum(pair.margin for pair in batch.pairs) / len(batch.pairs),
            "time": self.age,
        }
        self._store.append_row("metrics.jsonl", row)
        self._scalars(row, version)
        self._emit("step", row)

    def evaluated(self, version: int, metrics: dict[str, float], answers: Sequence[Answer], seconds: float) -> None:
        """Held-out answers of `version`, kept whole for the report."""
        self.last_evaluated = version
        rows = [
            {
                "prompt_id": answer.prompt.id,
                "question": answer.prompt.text,
                "truth": answer.prompt.truth,
                "image": answer.prompt.images[0].digest[:16] if answer.prompt.images else None,
                "answer": answer.completion.text,
                "length": len(answer.completion.token_ids),
                "judgement": asdict(answer.judgement),
            }
            for answer in answers
        ]
        self._store_images(answers)
        self._store.write_json(
            evaluation_file(version), {"version": version, "seconds": seconds, "metrics": metrics, "answers": rows}
        )
        self._scalars({f"eval/{name}": value for name, value in metrics.items()}, version)
        self._emit("evaluation", {"version": version, "seconds": seconds, **metrics})

    def base_answers(self) -> dict[str, BaseAnswer]:
        """The base's held-out answers, as text without tokens, by prompt id; none before it is evaluated."""
        if not self._store.exists(evaluation_file(0)):
            return {}
        return stored_answers(self._store.read_json(evaluation_file(0)))

    def warn(self, text: str) -> None:
        """Something a person should know at once."""
        self._emit("warning", {"text": text})

    def close(self) -> None:
        """Nothing more will happen, so nobody need wait for it."""
        self._closed = True
        self._new.set()

    async def wait(self, after: int) -> list[dict[str, Any]]:
        """Events with a number above `after`; waits up to `WATCH_S` for one."""
        if len(self._events) <= after and not self._closed:
            self._new.clear()
            try:
                await asyncio.wait_for(self._new.wait(), WATCH_S)
            except TimeoutError:
                return []
        return self._events[after:]

    def _store_images(self, answers: Sequence[Answer]) -> None:
        """The first pictures of the held-out prompts, once, for the report's gallery."""
        images = {image.digest[:16]: image for answer in answers for image in answer.prompt.images[:1]}
        for name, image in list(images.items())[:GALLERY_IMAGES]:
            if not self._store.exists(f"evaluations/images/{name}.png"):
                self._store.write_bytes(f"evaluations/images/{name}.png", image.png)

    def _emit(self, kind: str, values: dict[str, Any]) -> None:
        self._events.append({"kind": kind, **values})
        self._new.set()

    def _scalars(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and name not in ("step", "policy_version"):
                self._tensorboard.add_scalar(name if "/" in name else f"train/{name}", value, step)
        self._tensorboard.flush()


def _tensorboard(store: RunFolder) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(store.path("tensorboard") if store.is_local else store.url("tensorboard"))
