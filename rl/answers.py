"""Answers to imitate: the supervised strategies that arXiv 2402.10884 compares with DPO, as sources of examples."""

import string
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator

from cluster.errors import ConfigError, DataError
from cluster.settings import LocalPath, Settings
from rl.data import DataSettings, Report, ShuffledStream, WorldData
from rl.render import with_suffix
from rl.store import RunFolder
from rl.tables import Answers
from rl.types import WRITTEN, Attributes, Completion, Judgement, Prompt

Example = tuple[Prompt, str]


class WorldText(Settings):
    """The tiny world's biased training text, of which its base model was made."""

    kind: Literal["world"] = "world"
    """Which source."""

    def examples(self, seed: int, report: Report) -> Iterator[Example]:
        """Prompts and answers without end."""
        from rl.world.training_text import training_examples

        return training_examples(seed)


class ReferenceAnswers(Settings):
    """Standard SFT: the reference answers that came with the prompts."""

    kind: Literal["reference"]
    """Which source."""
    prompts: DataSettings = WorldData()
    """Where prompts come from; those without a reference answer are passed over."""

    def examples(self, seed: int, report: Report) -> Iterator[Example]:
        """Prompts and answers, shuffled anew every epoch.

        Raises:
            DataError: no prompt has a reference answer.
        """
        training = self.prompts.load(seed, report).training
        found = [(prompt, prompt.reference_answer) for prompt in training if prompt.reference_answer]
        if not found:
            raise DataError("data.prompts: no prompt has a reference answer to learn from")
        return _endless(found, seed)


class JudgedSettings(Settings):
    """Answers of a run of annotate."""

    path: LocalPath
    """The run folder."""

    def judged(self) -> list[Answers]:
        """All judged answers of the run.

        Raises:
            DataError: there are none.
        """
        folder = RunFolder(self.path)
        found = [one for step in folder.steps() for one in folder.read_answers(step) or () if one.judgements]
        if not found:
            raise DataError(f"data.path: {self.path} holds no judged answers; give the folder of a run of annotate")
        return found


class BestAnswers(JudgedSettings):
    """Rejection sampling: of each prompt's sampled answers the one with the highest score."""

    kind: Literal["best"]
    """Which source."""

    def examples(self, seed: int, report: Report) -> Iterator[Example]:
        """Prompts and answers, shuffled anew every epoch.

        Raises:
            DataError: nothing was judged.
        """
        chosen = []
        for answers in self.judged():
            scored = [
                (judgement.score, one.text)
                for one, judgement in zip(answers.completions, answers.judgements or (), strict=True)
                if judgement.score is not None and one.finish_reason != WRITTEN
            ]
            if scored:
                chosen.append((answers.prompt, max(scored, key=lambda pair: pair[0])[1]))
        if not chosen:
            raise DataError(f"data.path: the judge abstained on all answers in {self.path}, so none is the best")
        return _endless(chosen, seed)


class SteerLm(JudgedSettings):
    """SteerLM (Dong et al. 2023): every judged answer, asked for by naming its grades; the best grades are asked for
    when the model is used, as `raylign evaluate --suffix` does."""

    kind: Literal["steerlm"]
    """Which source."""
    template: str = (
        "helpfulness:{helpfulness},correctness:{correctness},coherence:{coherence},complexity:{complexity},"
        "verbosity:{verbosity}"
    )
    """What is put behind the user's message, with the grades of the answer that follows."""

    @field_validator("template")
    @classmethod
    def _names_attributes(cls, template: str) -> str:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        if not names or names - set(Attributes._fields):
            raise ConfigError(f"data.template may name {', '.join(Attributes._fields)} in braces, and must name one")
        return template

    def examples(self, seed: int, report: Report) -> Iterator[Example]:
        """Prompts with the grades behind them and answers, shuffled anew every epoch.

        Raises:
            DataError: no answer was graded by attributes.
        """
        found = [
            (with_suffix(answers.prompt, self.template.format(**judgement.attributes._asdict())), one.text)
            for answers in self.judged()
            for one, judgement in _graded(answers)
            if judgement.attributes is not None
        ]
        if not found:
            raise DataError(f"data.path: {self.path} has no answers graded by attributes; SteerLM needs a graded judge")
        return _endless(found, seed)


AnswerSettings = Annotated[WorldText | ReferenceAnswers | BestAnswers | SteerLm, Field(discriminator="kind")]


def _graded(answers: Answers) -> Iterator[tuple[Completion, Judgement]]:
    return zip(answers.completions, answers.judgements or (), strict=True)


def _endless(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    stream = ShuffledStream(examples, seed)
    while True:
        yield stream.take(1)[0]
