"""Pairs that exist already: those of another run, or a preference set in any format, for offline alignment."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from cluster.errors import DataError
from rl.data import FileSettings, Report, Usable
from rl.formats import Fault, FormatName, counted
from rl.pairs import PairSettings, make_pairs
from rl.render import prompt_token_ids, written_completion
from rl.store import RunFolder
from rl.types import Completion, Judgement, Pair, PairValues, Prompt

if TYPE_CHECKING:
    from transformers import ProcessorMixin


class OfflinePairs(FileSettings):
    """Learn from stored pairs; nothing is sampled but for evaluation."""

    kind: Literal["offline"]
    """Where pairs come from."""
    path: str
    """A run folder with pairs, or a file or folder of files in another format."""
    format: Literal["run"] | FormatName = "run"
    """`run` reads the pairs of a run of annotate or align."""
    choose: PairSettings = PairSettings()
    """How graded answers make pairs, for formats that hold grades instead of pairs."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the pairs that is used, drawn by the seed."""
    flipped: float = Field(0.0, ge=0, le=1)
    """Share of the used pairs whose chosen and rejected change places, to see what wrong labels do."""

    def files(self) -> list[tuple[str, str]]:
        """What is read: the field that names it, and its path."""
        return [("pairs.path", self.path)] if "://" not in self.path else []

    def load(
        self, seed: int, processor: "ProcessorMixin", max_length: int, heldout: Sequence[Prompt], report: Report
    ) -> list[Pair]:
        """The pairs as this model's tokens, without those about an image that is held out.

        Raises:
            DataError: there are none, or some are too long for `max_length` tokens and bad ones are to be refused.
        """
        held_out = {image.digest for prompt in heldout for image in prompt.images}
        pairs, faults = [], []
        for row, pair in enumerate(self._pairs(processor, report), start=1):
            if any(image.digest in held_out for image in pair.prompt.images):
                continue
            pair = _retokenised(pair, processor)
            length = max(len(one.prompt_token_ids) + len(one.token_ids) for one in pair.completions)
            if length > max_length:
                why = f"the pair takes {length} tokens, but policy.max_length is {max_length}"
                faults.append(Fault(self.path, row, why))
            else:
                pairs.append(pair)
        if faults:
            report(faults)
            if self.bad_rows == "refuse":
                raise DataError(
                    f"pairs.path: {counted(len(faults), 'too long pair')}: {faults[0]}; or set pairs.bad_rows=skip"
                )
        if not pairs:
            raise DataError(f"pairs.path: {self.path} holds no pair that is not about a held-out image")
        return ablate(pairs, self.fraction, self.flipped, seed)

    def _pairs(self, processor: "ProcessorMixin", report: Report) -> Iterator[Pair]:
        if self.format == "run":
            folder = RunFolder(self.path)
            steps = folder.steps()
            if not steps:
                raise DataError(
                    f"pairs.path: {self.path} is no run folder with pairs; say pairs.format for other files"
                )
            for step in steps:
                batch = folder.read_batch(step)
                for pair in batch.pairs if batch else ():
                    yield replace(pair, source="offline", policy_version=0)
            return
        for usable in self.records(self.path, self.format, "pairs.path", report, self.start, self.limit):
            yield from _record_pairs(usable, self.format, self.choose, processor)


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


def _record_pairs(usable: Usable, judge: str, choose: PairSettings, processor: "ProcessorMixin") -> Iterator[Pair]:
    prompt, record = usable
    completions = [written_completion(prompt, one.text, processor) for one in record.judged]
    judgements = [Judgement(one.score, one.attributes, "", judge, "") for one in record.judged]
    settings = PairSettings(margin=1) if record.preference else choose
    pairs, _ = make_pairs([prompt], [completions], [judgements], settings)
    for pair in pairs:
        yield replace(pair, source="offline")


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
