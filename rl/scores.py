"""What the losses of a batch of pairs are made of: log-probs of every token, under policy and reference."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from rl.types import ExtraRole, PairValues

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def each(function: Callable[..., T], *values: PairValues[Any]) -> PairValues[T]:
    """`function` of the chosen sides of all values, and of their rejected sides."""
    return PairValues(*(function(*sides) for sides in zip(*values, strict=True)))


@dataclass(frozen=True)
class ExtraScores:
    """Further sequences of a batch, each belonging to a pair.

    Under `corrupted` the chosen completion under a corrupted image; under `mismatched` another pair's chosen
    completion behind this prompt (KTO's drift); under `sample` further samples of the policy itself (D2O); under
    `judged` the rejected completion behind prompt and judgement (CUT). A pair may have none or several.
    """

    policy: "Tensor"
    """[rows, tokens] log-prob of each completion token in nats, 0 past the end."""
    reference: "Tensor | None"
    """[rows, tokens], as `policy`."""
    mask: "Tensor"
    """[rows, tokens] 1 at completion tokens, 0 past the end."""
    owner: "Tensor"
    """[rows] int64, the index in the batch of the pair it belongs to."""

    @property
    def ratios(self) -> "Tensor":
        """Summed log-ratio of policy to reference, in nats, [rows]."""
        return _token_ratios(self.policy, self.reference).sum(-1)

    def per_pair(self, values: "Tensor", pairs: int) -> "Tensor":
        """The sum of `values` [rows] over the rows of each of `pairs` pairs, 0 for a pair without any, [batch]."""
        return values.new_zeros(pairs).index_add(0, self.owner, values)


@dataclass(frozen=True)
class Scores:
    """What the losses of a batch of pairs are made of. Completions start at the first column."""

    policy: "PairValues[Tensor]"
    """[batch, tokens] log-prob of each completion token in nats, 0 past the end; both sides equally wide."""
    reference: "PairValues[Tensor] | None"
    """[batch, tokens], as `policy`; None if no loss needs it."""
    mask: "PairValues[Tensor]"
    """[batch, tokens] 1.0 at completion tokens, 0 past the end. A side without any is absent from its pair."""
    noise: "Tensor"
    """[batch] assumed probability that the order is wrong."""
    collision: "PairValues[Tensor] | None" = None
    """[batch, tokens] log sum_v p(v)^2 under the policy, for the WPO weights."""
    changed: "PairValues[Tensor] | None" = None
    """[batch, tokens] 1.0 where a token is not shared by both completions, for DDPO."""
    extras: "Mapping[ExtraRole, ExtraScores]" = field(default_factory=dict)
    """Further sequences. A role that a loss needs is there, if only with no rows."""

    def __len__(self) -> int:
        return len(self.noise)

    @property
    def sums(self) -> "PairValues[Tensor]":
        """Log-prob of each completion under the policy, in nats, [batch]."""
        return each(lambda logps: logps.sum(-1), self.policy)

    @property
    def lengths(self) -> "PairValues[Tensor]":
        """Completion tokens, [batch]."""
        return each(lambda mask: mask.sum(-1), self.mask)

    @property
    def present(self) -> "PairValues[Tensor]":
        """1.0 for each completion that is there, 0 for an absent side, [batch]."""
        return each(lambda mask: mask.amax(-1), self.mask)

    @property
    def means(self) -> "PairValues[Tensor]":
        """Mean log-prob per token under the policy, in nats, 0 for an absent side, [batch]."""
        return self.averaged(self.sums)

    @property
    def token_ratios(self) -> "PairValues[Tensor]":
        """Log-ratio of policy to reference of each token, in nats, [batch, tokens]."""
        return each(_token_ratios, self.policy, self.reference or PairValues(None, None))

    @property
    def ratios(self) -> "PairValues[Tensor]":
        """Summed log-ratio of policy to reference, in nats, [batch]."""
        return each(lambda ratios: ratios.sum(-1), self.token_ratios)

    @property
    def margin(self) -> "Tensor":
        """How much more than the reference the policy prefers chosen over rejected, in nats, [batch]."""
        return self.ratios.chosen - self.ratios.rejected

    def averaged(self, values: "PairValues[Tensor]") -> "PairValues[Tensor]":
        """`values` [batch] divided by the number of tokens."""
        return each(lambda value, length: value / length.clamp(min=1), values, self.lengths)


def _token_ratios(policy: "Tensor", reference: "Tensor | None") -> "Tensor":
    assert reference is not None, "these scores lack the reference's log-probs, which the loss needs"
    return policy - reference
