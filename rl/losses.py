"""Preference losses: pure functions from log-probs, log-ratios and lengths to one loss per pair.

Notation of the formulas: lp is the summed log-prob of a completion in nats, m its mean per token, n its number of
tokens, r its summed log-ratio of policy to reference; w is the chosen completion, l the rejected one; margin is
r_w - r_l, b is beta, s the logistic function. rl/objective.py names them and feeds them.
"""

import math
from typing import TYPE_CHECKING, Literal

from rl.scores import each
from rl.types import PairValues

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]

# Its exponential can be squared, as IPO does, and stays finite in float32.
LARGEST_EXPONENT = 40.0
# The mean log-prob of a completion that is certain, so that its odds stay finite in float32.
LARGEST_LOGP = -1e-6


def dpo_loss(margin: "Tensor", beta: float, label_smoothing: "Tensor | float" = 0.0) -> "Tensor":
    """-(1-e) log s(b margin) - e log s(-b margin), [batch].

    Rafailov et al. 2023, eq. 7; with label smoothing e, one for all or one per pair, Mitchell 2023 (conservative DPO).
    """
    return -(1 - label_smoothing) * _logsigmoid(beta * margin) - label_smoothing * _logsigmoid(-beta * margin)


def robust_loss(margin: "Tensor", beta: float, label_smoothing: float) -> "Tensor":
    """[-(1-e) log s(b margin) + e log s(-b margin)] / (1 - 2e), [batch]; can be negative.

    Unbiased under a share e of wrongly ordered pairs. Chowdhury et al. 2024 (arXiv 2403.00409).
    """
    right, wrong = _logsigmoid(beta * margin), _logsigmoid(-beta * margin)
    return (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge_loss(margin: "Tensor", beta: float) -> "Tensor":
    """max(0, 1 - b margin), [batch]. SLiC's hinge on log-ratios, Liu et al. 2023 (arXiv 2309.06657)."""
    return (1 - beta * margin).relu()


def ipo_loss(margin: "Tensor", beta: float) -> "Tensor":
    """(margin - 1 / (2 b))^2, [batch]. Azar et al. 2023, eq. 17 with beta for tau, on summed log-ratios; TRL has
    them averaged per token."""
    return (margin - 1 / (2 * beta)) ** 2


def nca_pair_loss(chosen: "Tensor", rejected: "Tensor", beta: float) -> "Tensor":
    """-log s(b r_w) - [log s(-b r_w) + log s(-b r_l)] / 2 of log-ratios, [batch].
    Chen et al. 2024 (arXiv 2402.05369)."""
    return -_logsigmoid(beta * chosen) - (_logsigmoid(-beta * chosen) + _logsigmoid(-beta * rejected)) / 2


def bco_pair_loss(chosen: "Tensor", rejected: "Tensor", beta: float) -> "Tensor":
    """-log s(b r_w) - log s(-b r_l) of log-ratios, [batch]. Jung et al. 2024 (arXiv 2404.04656), without the shift by
    the mean reward, as in TRL's DPO trainer."""
    return -_logsigmoid(beta * chosen) - _logsigmoid(-beta * rejected)


def sppo_loss(chosen: "Tensor", rejected: "Tensor", beta: float) -> "Tensor":
    """(r_w - 1/(2b))^2 + (r_l + 1/(2b))^2 of log-ratios, [batch]. Wu et al. 2024 (arXiv 2405.00675), hard labels."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero_loss(chosen: "Tensor", rejected: "Tensor", beta: float) -> "Tensor":
    """1 - s(b r_w) + s(b r_l) of log-ratios, [batch]: for completions better than the policy's.
    D'Oosterlinck et al. 2024 (arXiv 2408.06266)."""
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down_loss(chosen: "Tensor", rejected: "Tensor", beta: float) -> "Tensor":
    """s(b r_w) + 1 - s(b margin) of log-ratios, [batch]: for completions worse than the policy's.
    D'Oosterlinck et al. 2024 (arXiv 2408.06266)."""
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


def rdpo_loss(margin: "Tensor", extra_tokens: "Tensor", beta: float, alpha: float) -> "Tensor":
    """-log s(b margin + a (n_w - n_l)), [batch]. Park et al. 2024 (arXiv 2403.19159), sign as in CheXalign's code."""
    return -_logsigmoid(beta * margin + alpha * extra_tokens)


def simpo_loss(chosen: "Tensor", rejected: "Tensor", beta: float, gamma: float) -> "Tensor":
    """-log s(b (m_w - m_l) - gamma) of mean log-probs, [batch]. Meng et al. 2024 (arXiv 2405.14734)."""
    return -_logsigmoid(beta * (chosen - rejected) - gamma)


def sft_loss(chosen: "Tensor") -> "Tensor":
    """-m_w of mean log-probs, [batch]: negative log-likelihood per token."""
    return -chosen


def orpo_loss(chosen: "Tensor", rejected: "Tensor", beta: float) -> "Tensor":
    """-b log s(log odds_w - log odds_l) of mean log-probs, [batch]: the penalty that ORPO adds to the likelihood.
    Hong et al. 2024 (arXiv 2403.07691)."""
    return -beta * _logsigmoid(log_odds(chosen) - log_odds(rejected))


def asft_loss(chosen: "Tensor", rejected: "Tensor") -> "Tensor":
    """-log s(log odds_w) - log s(-log odds_l) of mean log-probs, [batch]: what ASFT adds to the likelihood.
    Wang et al. 2024 (arXiv 2409.10571); arXiv 2502.01237."""
    return -_logsigmoid(log_odds(chosen)) - _logsigmoid(-log_odds(rejected))


def log_odds(mean: "Tensor") -> "Tensor":
    """log(p / (1 - p)) with p = exp(mean), finite even for p = 1."""
    mean = mean.clamp(max=LARGEST_LOGP)
    return mean - log_one_minus_exp(mean)


def log_one_minus_exp(logps: "Tensor") -> "Tensor":
    """log(1 - p) with p = exp(logps), finite even for p = 1."""
    return (-logps.clamp(max=LARGEST_LOGP).expm1()).log()


def kto_loss(gain: "Tensor", beta: float) -> "Tensor":
    """1 - s(b gain), [batch]; gain is r - drift for a desirable completion, drift - r for an undesirable one.
    Ethayarajh et al. 2024 (arXiv 2402.01306)."""
    return (-beta * gain).sigmoid()


def kto_drift(ratios: "Tensor") -> "Tensor":
    """max(0, mean r) over completions behind prompts that are not theirs, without gradient; 0 if there are none.
    Takes [rows], gives a scalar. Ethayarajh et al. 2024 (arXiv 2402.01306)."""
    return (ratios.detach().sum() / max(1, len(ratios))).clamp(min=0)


def d2o_loss(samples: "Tensor", rejected: "Tensor", beta: float, alpha: float) -> "Tensor":
    """-log s(b mean_k r_k - a r_l), [batch]; takes the mean log-ratio of self-samples and that of the rejected.
    Duan et al. 2024 (arXiv 2403.03419), both anchors the reference."""
    return -_logsigmoid(beta * samples - alpha * rejected)


def poft_loss(policy: "Tensor", aligned: "Tensor", beta: float, gamma: float) -> "Tensor":
    """-log s(b (m - m_aligned) + gamma) of mean log-probs, [batch]; the aligned model is the reference.
    Preference-oriented supervised fine-tuning, Fan et al. 2024 (arXiv 2412.12865)."""
    return -_logsigmoid(beta * (policy - aligned) + gamma)


def cut_loss(logps: "Tensor", judged: "Tensor", mask: "Tensor", threshold: float, weight: float) -> "Tensor":
    """What CUT makes of a rejected completion, [rows], from log-probs [rows, tokens] without and with a judgement.

    Token means of: -a log(1 - p) where p(y | judgement) / p(y) > threshold, elsewhere -log p; plus
    -log p(y | judgement); half of the sum if there are tokens of the first sort. Xu et al. 2023 (arXiv 2312.14591).
    """
    inappropriate = (judged - logps > math.log(threshold)) & (mask > 0)
    unlikelihood = -weight * log_one_minus_exp(logps)
    tokens = (unlikelihood.where(inappropriate, -logps) - judged) * mask
    return tokens.sum(-1) / mask.sum(-1).clamp(min=1) / (1 + inappropriate.any(-1))


def ld_weights(masks: "PairValues[Tensor]", alpha: float) -> "PairValues[Tensor]":
    """Weights of tokens [batch, tokens]: 1 up to the length of the shorter completion, `alpha` beyond.
    Length-desensitised DPO, Liu et al. 2024 (arXiv 2409.06411)."""
    shorter = masks.chosen.sum(-1).minimum(masks.rejected.sum(-1)).unsqueeze(-1)
    return each(lambda mask: mask * (alpha + (1 - alpha) * (mask.cumsum(-1) <= shorter)), masks)


def ddpo_weights(mask: "Tensor", changed: "Tensor", gamma: float) -> "Tensor":
    """Weights of tokens [batch, tokens]: `gamma` where changed, else 1, divided by their sum over the completion.
    Dense DPO of RLHF-V, Yu et al. 2023 (arXiv 2312.00849)."""
    weights = mask * (1 + (gamma - 1) * changed)
    return weights / weights.sum(-1, keepdim=True).clamp(min=min(1.0, gamma))


def wpo_weight(logps: "Tensor", collision: "Tensor", mask: "Tensor") -> "Tensor":
    """exp(mean over tokens of log p(t) - log sum_v p(v)^2), [batch], without gradient.
    Zhou et al. 2024 (arXiv 2406.11827), of one completion."""
    tokens = (logps - collision).detach() * mask
    return (tokens.sum(-1) / mask.sum(-1).clamp(min=1)).exp()


def staleness_weight(policy: "Tensor", sampler: "Tensor", length: "Tensor") -> "Tensor":
    """exp(mean over tokens of log p(t) - log p_sampler(t)), at most 1, [batch], without gradient.

    Takes summed log-probs: how much less likely the policy has become to say a completion since it was sampled. In the
    spirit of Zhou et al. 2024 (arXiv 2406.11827), against the sampler's own log-probs.
    """
    return ((policy.detach() - sampler) / length.clamp(min=1)).clamp(max=0).exp()


def diverged(ratio: "Tensor", divergence: Divergence, alpha: float) -> "Tensor":
    """What f-DPO puts in the place of a log-ratio r, up to a constant, [batch].

    r for reverse KL, -exp(-r) for forward KL, log s(r) for Jensen-Shannon, exp((a-1) r) / (a-1) for the alpha
    divergence. Wang et al. 2023 (arXiv 2309.16240), as in TRL; exponents are cut at 40.
    """
    if divergence == "forward_kl":
        return -(-ratio).clamp(max=LARGEST_EXPONENT).exp()
    if divergence == "jensen_shannon":
        return _logsigmoid(ratio)
    if divergence == "alpha":
        return ((alpha - 1) * ratio).clamp(max=LARGEST_EXPONENT).exp() / (alpha - 1)
    return ratio


def _logsigmoid(values: "Tensor") -> "Tensor":
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)
