"""Whether a run is good enough to be served: judged by what it and the serving version said to the same prompts."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.config import AlignConfig
from rl.evaluation import Answer, BaseAnswer, stored_answers, win_rate
from rl.judges import JudgeContext, collect_keys
from rl.store import RunFolder, read_evaluations
from rl.types import Completion, Judgement, Prompt
from serve.settings import GateSettings


@dataclass(frozen=True)
class Verdict:
    """What the gate found, and which of its limits were not reached."""

    figures: dict[str, float | None]
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        told = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in self.figures.items())
        return f"gate {'passed' if self.passed else 'not passed'}: {told}"


def compare(config: AlignConfig, run: RunFolder, serving: RunFolder, settings: GateSettings) -> Verdict:
    """Compare the held-out answers that two runs ended with.

    Where the scores of the two runs cannot be compared, the answers are judged again, both to a prompt together, by
    the judge of `config`, which is the run's.
    """
    evaluations = read_evaluations(run)
    others = read_evaluations(serving)
    if not evaluations or not others:
        fault = f"{(serving if evaluations else run).address} was not evaluated on held-out prompts"
        return Verdict({"win_rate": None, "language_accuracy": None, "prompts": 0}, (fault,))
    new, old = stored_answers(evaluations[-1]), stored_answers(others[-1])
    common = [id for id in new if id in old]
    if not _comparable(evaluations[-1], others[-1], common):
        if config.judge.roles or config.judge.needs_reference:
            fault = f"scores of the judge {config.judge.kind} cannot be compared between runs"
            return Verdict({"win_rate": None, "language_accuracy": None, "prompts": len(common)}, (fault,))
        new, old = _judged_again(config, run, common, new, old)
    common = [id for id in common if _is_compared(new[id], old[id])]
    answers = [Answer(Prompt(id, ()), new[id].completion, _verdict(new[id].score)) for id in common]
    figures = {
        "win_rate": win_rate(answers, old),
        "language_accuracy": evaluations[-1]["metrics"].get("language_accuracy"),
        "prompts": len(common),
    }
    return Verdict(figures, tuple(_faults(figures, settings)))


def _faults(figures: Mapping[str, float | None], settings: GateSettings) -> list[str]:
    limits = {
        "win_rate": settings.win_rate, "language_accuracy": settings.language_accuracy, "prompts": settings.prompts,
    }  # fmt: skip
    return [
        f"{name.replace('_', ' ')} is {_shown(figures[name])}, but gate.{name} asks for {least:g}"
        for name, least in limits.items()
        if least is not None and (figures[name] or 0) < least
    ]


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def _comparable(one: Mapping[str, Any], other: Mapping[str, Any], common: Sequence[str]) -> bool:
    """Whether both were scored by the same judge, from the same instructions, on a scale that does not depend on what
    an answer was compared with."""
    judges = {
        (row["judgement"]["judge"], row["judgement"]["prompt_hash"])
        for evaluation in (one, other)
        for row in evaluation["answers"]
        if row["prompt_id"] in common
    }
    return len(judges) <= 1 and all("judge_score" in evaluation["metrics"] for evaluation in (one, other))


def _judged_again(
    config: AlignConfig,
    run: RunFolder,
    common: Sequence[str],
    new: Mapping[str, BaseAnswer],
    old: Mapping[str, BaseAnswer],
) -> tuple[dict[str, BaseAnswer], dict[str, BaseAnswer]]:
    """The same answers with the scores that the judge gives when it sees both."""
    _, heldout = config.data.load(config.seed, lambda faults: None)
    prompts = [prompt for prompt in heldout if prompt.id in common]
    groups: list[list[Completion]] = [[old[prompt.id].completion, new[prompt.id].completion] for prompt in prompts]
    judge = config.judge.build(JudgeContext(Path(run.path("logs")), collect_keys(config.judge)))
    verdicts = asyncio.run(judge.grade(prompts, groups))
    found: tuple[dict[str, BaseAnswer], dict[str, BaseAnswer]] = ({}, {})
    for prompt, group, judged in zip(prompts, groups, verdicts, strict=True):
        for side, completion, verdict in zip(found, group, judged, strict=True):
            side[prompt.id] = BaseAnswer(completion, verdict.score)
    return found[1], found[0]


def _is_compared(one: BaseAnswer, other: BaseAnswer) -> bool:
    return one.completion.text == other.completion.text or None not in (one.score, other.score)


def _verdict(score: float | None) -> Judgement:
    return Judgement(score, None, "", "gate", "")
