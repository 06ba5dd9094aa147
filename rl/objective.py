"""What the learner minimises: the losses by name, what each needs and heeds, and their settings.

A new loss is one pure function in rl/losses.py, its name in `LossName`, and one line in `LOSSES`.
"""

import difflib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, get_args

from pydantic import Field, field_validator, model_validator

from cluster.errors import ConfigError
from cluster.settings import Settings
from rl.losses import (
    Divergence,
    apo_down_loss,
    apo_zero_loss,
    asft_loss,
    bco_pair_loss,
    cut_loss,
    d2o_loss,
    ddpo_weights,
    diverged,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_drift,
    kto_loss,
    ld_weights,
    nca_pair_loss,
    orpo_loss,
    poft_loss,
    rdpo_loss,
    robust_loss,
    sft_loss,
    simpo_loss,
    sppo_loss,
    wpo_weight,
)
from rl.scores import Scores, each
from rl.types import ExtraRole, PairValues

if TYPE_CHECKING:
    from torch import Tensor

LossName = Literal[
    "sigmoid", "cdpo", "robust", "hinge", "ipo", "ipo_averaged", "nca_pair", "bco_pair", "sppo", "apo_zero",
    "apo_down", "sigmoid_norm", "ld", "rdpo", "rpo", "mpo", "cpo", "simpo", "orpo", "kto", "asft", "ddpo", "mdpo",
    "d2o", "cut", "poft", "sft",
]  # fmt: skip
Need = Literal[
    "reference", "pairs", "lengths", "collision", "changed", "corrupted", "mismatched", "sample", "judged"
]  # fmt: skip


OTHER_NAMES = {"dpo": "sigmoid", "slic": "hinge"}
"""What others call a loss."""


class LossSettings(Settings):
    """What the learner minimises."""

    kind: LossName | dict[LossName, float] = "sigmoid"
    """One loss, or several with their weights, such as {sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}. `sigmoid` is DPO."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference; larger stays closer. 0.1 suits summed log-ratios; the losses on
    means per token want more: simpo 2 to 10, sigmoid_norm 5, poft 1."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of wrongly ordered pairs, of cdpo and robust, which need one above 0; 0.1 is usual."""
    divergence: Divergence = "reverse_kl"
    """From the reference, of the losses on the margin; reverse_kl leaves the log-ratios as they are."""
    divergence_alpha: float = Field(0.5, gt=0, lt=1)
    """Of divergence alpha: towards 1 it is reverse_kl, towards 0 forward_kl."""
    weighting: Literal["none", "wpo"] = "none"
    """`wpo` weighs each pair by how likely the policy itself is to say both completions."""
    sft_weight: float = Field(1.0, ge=0)
    """Of the chosen completion's mean negative log-prob in rpo, cpo and orpo."""
    simpo_gamma_ratio: float = Field(0.5, ge=0)
    """Target margin of simpo as a multiple of beta: gamma = beta * this."""
    rdpo_alpha: float = Field(0.05, ge=0)
    """Nats per token by which rdpo discounts the longer completion."""
    ld_alpha: float = Field(0.5, ge=0, le=1)
    """Weight in ld of the tokens beyond the length that both completions have; 1 is sigmoid."""
    ddpo_gamma: float = Field(5.0, gt=0)
    """Weight in ddpo of the tokens that the completions do not share."""
    kto_desirable: float = Field(1.0, gt=0)
    """Weight in kto of chosen completions; times their number, 1 to 4/3 of the same for the rejected ones."""
    kto_undesirable: float = Field(1.0, gt=0)
    """Weight in kto of rejected completions."""
    asft_weight: float = Field(1.0, gt=0)
    """Of the odds in asft, beside the negative log-prob of the chosen completion."""
    d2o_alpha: float = Field(0.1, gt=0)
    """What beta is for the samples, for the rejected completion of d2o."""
    cut_threshold: float = Field(1.1, ge=1)
    """A token is inappropriate to cut if the judgement makes it this many times as likely: 1.1 online, 1.2 offline."""
    cut_weight: float = Field(1.0, gt=0)
    """Of the unlikelihood of inappropriate tokens in cut: 1 online, 0.5 offline."""
    poft_gamma: float = 0.0
    """Nats by which poft takes the policy to be ahead of the reference."""

    @field_validator("kind", mode="before")
    @classmethod
    def _check_kind(cls, kind: Any) -> Any:
        if isinstance(kind, dict):
            return _checked_weights(kind)
        if not isinstance(kind, str):
            raise ConfigError(f"loss.kind is {kind!r}, but must be the name of a loss, or names with their weights")
        _check_name(kind)
        return kind

    @model_validator(mode="after")
    def _check_every_field_is_heeded(self) -> Self:
        kinds = ", ".join(self.terms)
        for name, field in type(self).model_fields.items():
            heeding = [one for one, loss in LOSSES.items() if name in loss.reads]
            if heeding and getattr(self, name) != field.default and not self.terms.keys() & set(heeding):
                raise ConfigError(
                    f"loss.{name} is {getattr(self, name)}, but loss.kind {kinds} does not heed it: leave it out, or "
                    f"choose from {', '.join(heeding)}"
                )
        if self.divergence_alpha != type(self).model_fields["divergence_alpha"].default and self.divergence != "alpha":
            raise ConfigError(
                f"loss.divergence_alpha is {self.divergence_alpha}, but loss.divergence {self.divergence} does not "
                f"heed it: leave it out, or set loss.divergence to alpha"
            )
        return self

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        for smoothed in ("cdpo", "robust"):
            if smoothed in self.terms and self.label_smoothing == 0:
                raise ConfigError(
                    f"loss.label_smoothing is 0, but loss.kind {smoothed} needs the share of wrongly ordered pairs: "
                    f"set it, 0.1 is usual, or use sigmoid"
                )
        return self

    @property
    def terms(self) -> "dict[LossName, float]":
        """The losses to add up, with their weights."""
        return dict(self.kind) if isinstance(self.kind, dict) else {self.kind: 1.0}

    @property
    def needs(self) -> "frozenset[Need]":
        """What the scores must hold."""
        weighting: frozenset[Need] = frozenset({"collision", "lengths"} if self.weighting == "wpo" else ())
        return weighting.union(*(LOSSES[name].needs for name in self.terms))

    @property
    def extra_roles(self) -> frozenset[ExtraRole]:
        """The further sequences that must be scored beside each pair."""
        return frozenset(role for role in get_args(ExtraRole) if role in self.needs)

    @property
    def needs_reference(self) -> bool:
        """Whether the reference must score the pairs."""
        return "reference" in self.needs

    @property
    def heeds_noise(self) -> bool:
        """Whether any term heeds the pairs' own label noise."""
        return any(LOSSES[name].heeds_noise for name in self.terms)

    def loss(self, scores: Scores) -> "Tensor":
        """One value per pair, [batch]: the weighted sum of the terms."""
        total = sum(weight * LOSSES[name].function(scores, self) for name, weight in self.terms.items())
        if self.weighting == "wpo":
            assert scores.collision is not None, "these scores lack `collision`, which the WPO weights need"
            weights = each(wpo_weight, scores.policy, scores.collision, scores.mask)
            total = total * weights.chosen * weights.rejected
        return total  # type: ignore[return-value]  # of one term or more, so never the number 0


def _check_name(name: Any) -> None:
    if name not in LOSSES:
        near = OTHER_NAMES.get(str(name).lower()) or difflib.get_close_matches(str(name), LOSSES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"loss.kind is {name!r}, but must be one of {', '.join(LOSSES)}; did you mean {near}?")


def _checked_weights(kind: dict[Any, Any]) -> dict[str, float]:
    if not kind:
        raise ConfigError("loss.kind is empty: name at least one loss, for example {sigmoid: 1.0}")
    return {name: _checked_weight(name, weight) for name, weight in kind.items()}


def _checked_weight(name: Any, weight: Any) -> float:
    _check_name(name)
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)  # YAML reads 1e-4 as a text
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"loss.kind.{name} is {weight!r}, but a weight must be a number above 0")
    return number


LossFunction = Callable[[Scores, LossSettings], "Tensor"]


class Loss(NamedTuple):
    """A loss as the learner calls it."""

    function: LossFunction
    """From scores to one value per pair, [batch]."""
    needs: frozenset[Need]
    """What must be in the scores. Without `pairs`, either side may be absent, and the loss of a pair is the sum of the
    losses that its sides have alone; `lengths` means that the number of tokens matters."""
    reads: tuple[str, ...] = ("beta",)
    """The fields of `LossSettings` that it heeds."""
    heeds_noise: bool = False
    """Whether it heeds the pairs' own label noise."""


def _difference(values: "PairValues[Tensor]") -> "Tensor":
    return values.chosen - values.rejected


def _diverged(ratios: "PairValues[Tensor]", settings: LossSettings) -> "PairValues[Tensor]":
    return each(lambda ratio: diverged(ratio, settings.divergence, settings.divergence_alpha), ratios)


def _margin(scores: Scores, settings: LossSettings) -> "Tensor":
    return _difference(_diverged(scores.ratios, settings))


def _averaged_margin(scores: Scores, settings: LossSettings) -> "Tensor":
    return _difference(scores.averaged(_diverged(scores.ratios, settings)))


def _weighted_margin(scores: Scores, weights: "PairValues[Tensor]", settings: LossSettings) -> "Tensor":
    ratios = each(lambda ratios, weight: (ratios * weight).sum(-1), scores.token_ratios, weights)
    return _difference(_diverged(ratios, settings))


def _of_ratios(function: "Callable[[Tensor, Tensor, float], Tensor]") -> LossFunction:
    return lambda scores, settings: function(*scores.ratios, settings.beta)


def _sft(scores: Scores, settings: LossSettings) -> "Tensor":
    return sft_loss(scores.means.chosen)


def _sigmoid(scores: Scores, settings: LossSettings) -> "Tensor":
    return dpo_loss(_margin(scores, settings), settings.beta, scores.noise)


def _cdpo(scores: Scores, settings: LossSettings) -> "Tensor":
    return dpo_loss(_margin(scores, settings), settings.beta, scores.noise.clamp(min=settings.label_smoothing))


def _ld(scores: Scores, settings: LossSettings) -> "Tensor":
    weights = ld_weights(scores.mask, settings.ld_alpha)
    return dpo_loss(_weighted_margin(scores, weights, settings), settings.beta)


def _ddpo(scores: Scores, settings: LossSettings) -> "Tensor":
    assert scores.changed is not None, "these scores lack `changed`, which DDPO needs"
    weights = each(lambda mask, changed: ddpo_weights(mask, changed, settings.ddpo_gamma), scores.mask, scores.changed)
    return dpo_loss(_weighted_margin(scores, weights, settings), settings.beta)


def _rdpo(scores: Scores, settings: LossSettings) -> "Tensor":
    extra_tokens = _difference(scores.lengths)
    return rdpo_loss(_margin(scores, settings), extra_tokens, settings.beta, settings.rdpo_alpha)


def _rpo(scores: Scores, settings: LossSettings) -> "Tensor":
    """Iterative RPO, Pang et al. 2024 (arXiv 2404.19733)."""
    return _sigmoid(scores, settings) + settings.sft_weight * _sft(scores, settings)


def _mpo(scores: Scores, settings: LossSettings) -> "Tensor":
    """Mixed preference optimisation, Wang et al. 2024 (arXiv 2411.10442)."""
    quality = bco_pair_loss(*scores.ratios, settings.beta)
    return 0.8 * _sigmoid(scores, settings) + 0.2 * quality + _sft(scores, settings)


def _cpo(scores: Scores, settings: LossSettings) -> "Tensor":
    """DPO with a uniform reference, and the likelihood. Xu et al. 2024 (arXiv 2401.08417)."""
    return dpo_loss(_difference(scores.sums), settings.beta) + settings.sft_weight * _sft(scores, settings)


def _simpo(scores: Scores, settings: LossSettings) -> "Tensor":
    return simpo_loss(*scores.means, settings.beta, settings.beta * settings.simpo_gamma_ratio)


def _orpo(scores: Scores, settings: LossSettings) -> "Tensor":
    return orpo_loss(*scores.means, settings.beta) + settings.sft_weight * _sft(scores, settings)


def _asft(scores: Scores, settings: LossSettings) -> "Tensor":
    return _sft(scores, settings) + settings.asft_weight * asft_loss(*scores.means)


def _kto(scores: Scores, settings: LossSettings) -> "Tensor":
    drift = kto_drift(scores.extras["mismatched"].ratios)
    desirable = settings.kto_desirable * kto_loss(scores.ratios.chosen - drift, settings.beta)
    undesirable = settings.kto_undesirable * kto_loss(drift - scores.ratios.rejected, settings.beta)
    return desirable * scores.present.chosen + undesirable * scores.present.rejected


def _mdpo(scores: Scores, settings: LossSettings) -> "Tensor":
    """DPO, DPO of the images, and an anchor that keeps the chosen completion likely. Wang et al. 2024
    (arXiv 2406.11839). A pair without a corrupted image, such as one of texts alone, has no second term."""
    corrupted, chosen = scores.extras["corrupted"], scores.ratios.chosen
    images = dpo_loss(chosen[corrupted.owner] - corrupted.ratios, settings.beta)
    anchor = dpo_loss(chosen, settings.beta)
    return dpo_loss(scores.margin, settings.beta) + corrupted.per_pair(images, len(scores)) + anchor


def _d2o(scores: Scores, settings: LossSettings) -> "Tensor":
    sample, ratios = scores.extras["sample"], scores.ratios
    number = 1 + sample.per_pair(sample.ratios.new_ones(len(sample.owner)), len(scores))
    samples = (ratios.chosen + sample.per_pair(sample.ratios, len(scores))) / number
    return d2o_loss(samples, ratios.rejected, settings.beta, settings.d2o_alpha)


def _cut(scores: Scores, settings: LossSettings) -> "Tensor":
    """The likelihood of the chosen completion, and `cut_loss` of a rejected one that was judged."""
    judged = scores.extras["judged"]
    width = min(judged.policy.shape[-1], scores.policy.rejected.shape[-1])
    logps, mask = (values.rejected[judged.owner, :width] for values in (scores.policy, scores.mask))
    losses = cut_loss(logps, judged.policy[:, :width], mask, settings.cut_threshold, settings.cut_weight)
    return _sft(scores, settings) + judged.per_pair(losses, len(scores))


def _poft(scores: Scores, settings: LossSettings) -> "Tensor":
    assert scores.reference is not None, "these scores lack the aligned model's log-probs, which PoFT needs"
    aligned = scores.averaged(each(lambda logps: logps.sum(-1), scores.reference)).chosen
    return poft_loss(scores.means.chosen, aligned, settings.beta, settings.poft_gamma) * scores.present.chosen


PAIRS: frozenset[Need] = frozenset({"pairs", "reference"})
AVERAGED: frozenset[Need] = PAIRS | {"lengths"}
REFERENCE_FREE: frozenset[Need] = frozenset({"pairs", "lengths"})
MARGIN = ("beta", "divergence", "divergence_alpha")

LOSSES: dict[LossName, Loss] = {
    "sigmoid": Loss(_sigmoid, PAIRS, MARGIN, heeds_noise=True),
    "cdpo": Loss(_cdpo, PAIRS, (*MARGIN, "label_smoothing"), heeds_noise=True),
    "robust": Loss(
        lambda scores, settings: robust_loss(_margin(scores, settings), settings.beta, settings.label_smoothing),
        PAIRS,
        (*MARGIN, "label_smoothing"),
    ),
    "hinge": Loss(lambda scores, settings: hinge_loss(_margin(scores, settings), settings.beta), PAIRS, MARGIN),
    "ipo": Loss(lambda scores, settings: ipo_loss(_margin(scores, settings), settings.beta), PAIRS, MARGIN),
    "ipo_averaged": Loss(
        lambda scores, settings: ipo_loss(_averaged_margin(scores, settings), settings.beta), AVERAGED, MARGIN
    ),
    "nca_pair": Loss(_of_ratios(nca_pair_loss), PAIRS),
    "bco_pair": Loss(_of_ratios(bco_pair_loss), PAIRS),
    "sppo": Loss(_of_ratios(sppo_loss), PAIRS),
    "apo_zero": Loss(_of_ratios(apo_zero_loss), PAIRS),
    "apo_down": Loss(_of_ratios(apo_down_loss), PAIRS),
    "sigmoid_norm": Loss(
        lambda scores, settings: dpo_loss(_averaged_margin(scores, settings), settings.beta), AVERAGED, MARGIN
    ),
    "ld": Loss(_ld, AVERAGED, (*MARGIN, "ld_alpha")),
    "rdpo": Loss(_rdpo, AVERAGED, (*MARGIN, "rdpo_alpha")),
    "rpo": Loss(_rpo, AVERAGED, (*MARGIN, "sft_weight"), heeds_noise=True),
    "mpo": Loss(_mpo, AVERAGED, MARGIN, heeds_noise=True),
    "cpo": Loss(_cpo, REFERENCE_FREE, ("beta", "sft_weight")),
    "simpo": Loss(_simpo, REFERENCE_FREE, ("beta", "simpo_gamma_ratio")),
    "orpo": Loss(_orpo, REFERENCE_FREE, ("beta", "sft_weight")),
    "kto": Loss(_kto, frozenset({"reference", "mismatched"}), ("beta", "kto_desirable", "kto_undesirable")),
    "asft": Loss(_asft, REFERENCE_FREE, ("asft_weight",)),
    "ddpo": Loss(_ddpo, AVERAGED | {"changed"}, (*MARGIN, "ddpo_gamma")),
    "mdpo": Loss(_mdpo, PAIRS | {"corrupted"}),
    "d2o": Loss(_d2o, PAIRS | {"sample"}, ("beta", "d2o_alpha")),
    "cut": Loss(_cut, frozenset({"lengths", "judged"}), ("cut_threshold", "cut_weight")),
    "poft": Loss(_poft, frozenset({"reference", "lengths"}), ("beta", "poft_gamma")),
    "sft": Loss(_sft, frozenset({"lengths"}), ()),
}
