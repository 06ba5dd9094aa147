"""Pairs that exist already: those of another run, or a preference set in any format, for offline alignment."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cluster.errors import ConfigError, DataError
from cluster.settings import LocalPath
from rl.data import FileSettings, Report, Usable
from rl.formats import Fault, FormatName, counted
from rl.pairs import PairSettings, make_pairs
from rl.render import prompt_token_ids, written_completion
from rl.store import RunFolder
from rl.types import Completion, Judgement, Pair, PairValues, Prompt

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_WHY = {"ties": "too close", "identical": "the same", "unjudged": "not graded"}


class OfflinePairs(FileSettings):
    """Learn from stored pairs; nothing is sampled, so nothing is evaluated either."""

    kind: Literal["offline"] = "offline"
    """Where pairs come from."""
    path: LocalPath
    """A run folder with pairs, or a file or folder of files in another format."""
    format: Literal["run"] | FormatName = "run"
    """`run` reads the pairs of a run of annotate or align."""
    choose: PairSettings = PairSettings()
    """How graded answers make pairs, for formats that hold grades instead of pairs."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the pairs that is used, drawn by the seed."""
    flipped: float = Field(0.0, ge=0, le=1)
    """Share of the used pairs whose chosen and rejected change places, to see what wrong labels do."""

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        if self.choose.uncertain is not None:
            raise ConfigError("choose.uncertain smooths labels of sampled pairs: leave it out of stored ones")
        return self

    def files(self, section: str) -> list[tuple[str, str]]:
        """What is read: the field that names it, and its path; `section` is where these settings stand."""
        return [(f"{section}.path", self.path)] if "://" not in self.path else []

    def check(self, section: str) -> list[int]:
        """Refuse, before anything is started, a run folder without pairs; returns the steps that have some.

        Raises:
            DataError: names the field; `section` is where these settings stand.
        """
        if self.format != "run":
            return []
        if not (steps := RunFolder(self.path).steps()):
            raise DataError(
                f"{section}.path: {self.path} is no run folder with pairs; say {section}.format for other files"
            )
        return steps

    def load(
        self,
        section: str,
        seed: int,
        processor: "ProcessorMixin",
        max_length: int,
        heldout: Sequence[Prompt],
        report: Report,
    ) -> list[Pair]:
        """The pairs as this model's tokens, without those about an image that is held out. `section` is where these
        settings stand, for errors.

        Raises:
            DataError: there are none, or some are too long for `max_length` tokens and bad ones are to be refused.
        """
        held_out = {image.digest for prompt in heldout for image in prompt.images}
        pairs, faults = [], []
        counts: Counter[str] = Counter()
        for pair, where in self._pairs(section, processor, report, counts):
            if any(image.digest in held_out for image in pair.prompt.images):
                counts["about a held-out image"] += 1
                continue
            pair = _retokenised(pair, processor)
            length = max(len(one.prompt_token_ids) + len(one.token_ids) for one in pair.completions)
            if length > max_length:
                why = f"the pair takes {length} tokens, but policy.max_length is {max_length}"
                faults.append(Fault(*where, why))
            else:
                pairs.append(pair)
        if faults:
            report(faults)
            if self.bad_rows == "refuse":
                raise DataError(
                    f"{section}.path: {counted(len(faults), 'too long pair')}: {faults[0]}; or set "
                    f"{section}.bad_rows=skip"
                )
        if not pairs:
            told = ", ".join(f"{counted(number, 'row')} {why}" for why, number in counts.items())
            raise DataError(f"{section}.path: {self.path} gives no pair" + (f" ({told})" if told else ""))
        return ablate(pairs, self.fraction, self.flipped, seed)

    def _pairs(
        self, section: str, processor: "ProcessorMixin", report: Report, counts: Counter[str]
    ) -> Iterator[tuple[Pair, tuple[str, int]]]:
        """Pairs with the file and row they come from; `counts` is told of rows that make none."""
        if self.format == "run":
            folder = RunFolder(self.path)
            for step in self.check(section):
                batch = folder.read_batch(step)
                again = batch is None or "replayed" in batch.counts  # a later epoch's, which are there already
                for row, pair in enumerate(() if batch is None or again else batch.pairs, start=1):
                    yield replace(pair, source="offline", policy_version=0), (f"step {step}", row)
            return
        for usable in self.records(self.path, self.format, f"{section}.path", report, self.start, self.limit):
            settings = PairSettings(margin=1) if usable.record.preference else self.choose
            pairs, made = _record_pairs(usable, self.format, settings, processor)
            for name in ("ties", "identical", "unjudged"):
                if made[name]:
                    counts[f"whose answers are {_WHY[name]}"] += made[name]
            for pair in pairs:
                yield pair, usable.where


def ablate(pairs: Sequence[Pair], fraction: float, flipped: float, seed: int) -> list[Pair]:
    """A share of the pairs, and of those a share with their order reversed (the ablations of arXiv 2402.10884)."""
    rng = np.random.default_rng([seed, 19])
    kept = sorted(rng.permutation(len(pairs))[: max(1, round(fraction * len(pairs)))])
    turned = set(rng.permutation(kept)[: round(flipped * len(kept))])
    return [_flip(pairs[index]) if index in turned else pairs[index] for index in kept]


def _flip(pair: Pair) -> Pair:
    logps = pair.reference_logps
    return replace(
        pair,
        completions=PairValues(pair.completions.rejected, pair.completions.chosen),
        judgements=PairValues(pair.judgements.rejected, pair.judgements.chosen),
        reference_logps=None if logps is None else PairValues(logps.rejected, logps.chosen),
        margin=-pair.margin,
    )


def _record_pairs(
    usable: Usable, judge: str, settings: PairSettings, processor: "ProcessorMixin"
) -> tuple[list[Pair], Counter[str]]:
    prompt, record = usable.prompt, usable.record
    completions = [written_completion(prompt, one.text, processor) for one in record.judged]
    judgements = [Judgement(one.score, one.attributes, "", judge, "") for one in record.judged]
    pairs, counts = make_pairs([prompt], [completions], [judgements], settings)
    return [replace(pair, source="offline") for pair in pairs], counts


def _retokenised(pair: Pair, processor: "ProcessorMixin") -> Pair:
    """Pairs that another model sampled are written anew in this model's tokens."""
    own = prompt_token_ids(pair.prompt, processor, expand_images=True)
    tokenizer = getattr(processor, "tokenizer", processor)

    def fits(one: Completion) -> bool:
        text = tokenizer.decode(one.token_ids, skip_special_tokens=True)
        return one.prompt_token_ids == own and text.strip() == one.text

    if all(fits(one) for one in pair.completions):
        return pair
    written = PairValues(*(written_completion(pair.prompt, one.text, processor) for one in pair.completions))
    return replace(pair, completions=written, reference_logps=None, reference_version="")
