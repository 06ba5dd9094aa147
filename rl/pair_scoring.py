"""A batch of pairs as the log-probs that losses are made of."""

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, get_args

from rl.extras import sequences
from rl.losses import staleness_weight
from rl.objective import Need
from rl.scores import ExtraScores, Scores
from rl.scoring import Batch, by_completion, collate, token_scores
from rl.types import ExtraRole, Pair, PairValues

if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin


def score_pairs(
    pairs: Sequence[Pair],
    model: "torch.nn.Module",
    processor: "ProcessorMixin",
    device: "torch.device",
    needs: Collection[Need],
    reference: "Callable[[Batch], torch.Tensor] | None" = None,
) -> Scores:
    """Score chosen, rejected and extras of all pairs in one forward pass.

    The reference's log-probs are those that the pairs carry, or what `reference` makes of the batch, [rows, length].
    """
    import torch

    of_pairs = [sequences(pair) for pair in pairs]
    rows = [one[0] for one in of_pairs] + [one[1] for one in of_pairs]
    rows += [extra for one in of_pairs for extra in one[2:]]
    batch = collate(rows, processor, run_vision=hasattr(processor, "image_processor"))
    ratios_needed = "reference" in needs
    known = by_completion(reference(batch), rows) if reference and ratios_needed else _known_reference(pairs, device)
    scored = token_scores(model, batch, device, with_collision="collision" in needs)
    policy = by_completion(scored.logps, rows)
    mask = _padded([[1.0] * len(row.token_ids) for row in rows], device)
    return Scores(
        policy=_sides(policy, len(pairs)),
        reference=None if known is None else _sides(known, len(pairs)),
        mask=_sides(mask, len(pairs)),
        noise=torch.tensor([pair.label_noise for pair in pairs], device=device),
        collision=None if scored.collision is None else _sides(by_completion(scored.collision, rows), len(pairs)),
        changed=_changed(pairs, mask) if "changed" in needs else None,
        extras=_extras(pairs, policy, known, mask, needs),
    )


def trust(pairs: Sequence[Pair], scores: Scores, stale: Sequence[bool]) -> "torch.Tensor":
    """What each pair's loss is multiplied by, [batch]: 1 for fresh pairs; for stale ones `staleness_weight` of both
    completions, where the sampler's log-probs are known."""
    import torch

    factors = torch.ones_like(scores.noise)
    for side, policy in enumerate(scores.sums):
        completions = [pair.completions[side] for pair in pairs]
        known = [old and bool(one.logps) for old, one in zip(stale, completions, strict=True)]
        sampled = torch.tensor([sum(one.logps) for one in completions], device=policy.device)
        weights = staleness_weight(policy, sampled, scores.lengths[side])
        factors = factors * weights.where(torch.tensor(known, device=policy.device), 1.0)
    return factors


def _known_reference(pairs: Sequence[Pair], device: "torch.device") -> "torch.Tensor | None":
    """What the pairs carry, in the order of the rows; None where nothing was scored."""
    sides = [pair.reference_logps for pair in pairs]
    extras = [extra.reference_logps for pair in pairs for extra in pair.extras]
    if any(one is None for one in (*sides, *extras)):
        return None
    rows = [one.chosen for one in sides if one] + [one.rejected for one in sides if one]
    return _padded([*rows, *(one for one in extras if one is not None)], device)


def _extras(
    pairs: Sequence[Pair],
    policy: "torch.Tensor",
    reference: "torch.Tensor | None",
    mask: "torch.Tensor",
    needs: Collection[Need],
) -> dict[ExtraRole, ExtraScores]:
    import torch

    first = 2 * len(pairs)
    found: dict[ExtraRole, list[tuple[int, int]]] = {role: [] for role in get_args(ExtraRole) if role in needs}
    roles = ((extra.role, owner) for owner, pair in enumerate(pairs) for extra in pair.extras)
    for row, (role, owner) in enumerate(roles, start=first):
        if role in found:
            found[role].append((row, owner))
    return {
        role: ExtraScores(
            policy=policy[[row for row, _ in places]],
            reference=None if reference is None else reference[[row for row, _ in places]],
            mask=mask[[row for row, _ in places]],
            owner=torch.tensor([owner for _, owner in places], dtype=torch.long, device=policy.device),
        )
        for role, places in found.items()
    }


def _changed(pairs: Sequence[Pair], mask: "torch.Tensor") -> "PairValues[torch.Tensor]":
    """1 where a token of one completion has no partner in the other, as in RLHF-V's segments."""
    import torch

    flags = torch.zeros_like(mask)
    for index, pair in enumerate(pairs):
        chosen, rejected = (one.token_ids for one in pair.completions)
        sides = flags[index], flags[len(pairs) + index]
        for side, tokens in zip(sides, (chosen, rejected), strict=True):
            side[: len(tokens)] = 1
        for *starts, size in difflib.SequenceMatcher(None, chosen, rejected, False).get_matching_blocks():
            for side, start in zip(sides, starts, strict=True):
                side[start : start + size] = 0
    return _sides(flags, len(pairs))


def _sides(rows: "torch.Tensor", pairs: int) -> "PairValues[torch.Tensor]":
    return PairValues(rows[:pairs], rows[pairs : 2 * pairs])


def _padded(rows: Iterable[Sequence[float]], device: "torch.device") -> "torch.Tensor":
    import torch
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence([torch.tensor(row, device=device) for row in rows], batch_first=True)
