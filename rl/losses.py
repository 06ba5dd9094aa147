"""Preference losses: pure functions from summed log-probs to one loss per pair.

A new loss is one function here and one line in `LOSSES`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cluster.settings import Settings
from rl.types import PairValues

if TYPE_CHECKING:
    from torch import Tensor

LossName = Literal["sigmoid", "ipo"]


class LossSettings(Settings):
    """What the learner minimises."""

    kind: LossName = "sigmoid"
    """`sigmoid` is DPO; `ipo` regresses the margin to 1 / (2 beta)."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference; larger stays closer."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of wrongly ordered pairs; `sigmoid` only."""

    def build(self) -> "PairLoss":
        """The loss as a function of policy and reference log-probs and each pair's own label noise."""
        return lambda policy, reference, noise: LOSSES[self.kind](log_ratio_margin(policy, reference), noise, self)


PairLoss = Callable[["PairValues[Tensor]", "PairValues[Tensor]", "Tensor"], "Tensor"]


def log_ratio_margin(policy: "PairValues[Tensor]", reference: "PairValues[Tensor]") -> "Tensor":
    """How much more than the reference the policy prefers chosen over rejected, in nats, [batch].

    Takes summed completion log-probs, each [batch].
    """
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def dpo_loss(margin: "Tensor", beta: float, label_smoothing: "Tensor | float" = 0.0) -> "Tensor":
    """-(1-e) log sigmoid(beta margin) - e log sigmoid(-beta margin), [batch].

    Rafailov et al. 2023, eq. 7; with label smoothing e, one for all or one per pair, Mitchell 2023 (conservative DPO).
    """
    from torch.nn.functional import logsigmoid

    return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)


def ipo_loss(margin: "Tensor", beta: float) -> "Tensor":
    """(margin - 1 / (2 beta))^2 on summed log-probs, [batch]. Azar et al. 2023, eq. 17 with beta for tau."""
    return (margin - 1 / (2 * beta)) ** 2


LOSSES: dict[LossName, "Callable[[Tensor, Tensor, LossSettings], Tensor]"] = {
    "sigmoid": lambda margin, noise, settings: dpo_loss(
        margin, settings.beta, noise.clamp(min=settings.label_smoothing)
    ),
    "ipo": lambda margin, noise, settings: ipo_loss(margin, settings.beta),
}
