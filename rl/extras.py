"""Further sequences that some losses score beside a pair, and what is scored of a pair in all."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from rl.images import CanonicalImage, canonicalise
from rl.render import prompt_token_ids, with_suffix
from rl.scoring import ScoredSequence, to_sequence
from rl.types import Completion, Extra, ExtraRole, Pair

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_KEPT_AREA = (0.01, 0.2)
_MIN_CROP = 4


def with_extras(
    pairs: Sequence[Pair],
    roles: Collection[ExtraRole],
    samples: Mapping[str, Sequence[Completion]],
    processor: "ProcessorMixin",
    max_length: int,
) -> list[Pair]:
    """The pairs with the extras that a loss needs, but for those over `max_length` tokens. `samples` has the policy's
    completions by prompt id."""
    made = []
    for index, pair in enumerate(pairs):
        extras: list[Extra] = []
        chosen, rejected = pair.completions
        if "corrupted" in roles and pair.prompt.images:
            extras.append(Extra("corrupted", chosen))
        others = (one for one in [*pairs[index + 1 :], *pairs[:index]] if one.prompt.id != pair.prompt.id)
        if "mismatched" in roles and (other := next(others, None)) is not None:
            mismatched = replace(other.completions.chosen, prompt_token_ids=chosen.prompt_token_ids)
            extras.append(Extra("mismatched", mismatched))
        if "sample" in roles:
            used = {chosen.text, rejected.text}
            extras += [Extra("sample", one) for one in samples.get(pair.prompt.id, ()) if one.text not in used]
        if "judged" in roles and pair.judgements.rejected.reason:
            asked = with_suffix(pair.prompt, pair.judgements.rejected.reason)
            ids = prompt_token_ids(asked, processor, expand_images=True)
            extras.append(Extra("judged", replace(rejected, prompt_token_ids=ids)))
        fitting = [one for one in extras if len(to_sequence(pair.prompt, one.completion)) <= max_length]
        made.append(replace(pair, extras=tuple(fitting)))
    return made


def sequences(pair: Pair) -> list[ScoredSequence]:
    """What is scored of a pair: chosen, rejected, then its extras."""
    return [
        *(to_sequence(pair.prompt, one) for one in pair.completions),
        *(_extra_sequence(pair, extra) for extra in pair.extras),
    ]


def _extra_sequence(pair: Pair, extra: Extra) -> ScoredSequence:
    sequence = to_sequence(pair.prompt, extra.completion)
    return replace(sequence, images=tuple(map(corrupted, sequence.images))) if extra.role == "corrupted" else sequence


@lru_cache(maxsize=512)
def corrupted(image: CanonicalImage) -> CanonicalImage:
    """A crop of 1 to 20 % of the picture, enlarged to its size (mDPO, arXiv 2406.11839); always the same one."""
    rng = np.random.default_rng(int(image.digest[:16], 16))
    side = np.sqrt(rng.uniform(*_KEPT_AREA))
    width, height = (min(full, max(_MIN_CROP, round(full * side))) for full in (image.width, image.height))
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    crop = image.open().crop((left, top, left + width, top + height)).resize((image.width, image.height))
    return canonicalise(crop, "corrupted image")
