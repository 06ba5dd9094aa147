"""Losses against values worked out by hand, and what must hold of every one of them."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from cluster.errors import ConfigError
from rl import losses
from rl.objective import LOSSES, LossName, LossSettings, Need
from rl.scores import ExtraRole, ExtraScores, Scores, each
from rl.types import PairValues

KINDS = sorted(LOSSES)
ROLES: tuple[ExtraRole, ...] = get_args(ExtraRole)
OWNERS: dict[ExtraRole, list[int]] = {"corrupted": [0, 1], "mismatched": [0, 1], "sample": [1, 1], "judged": [0, 1]}
NEEDED = {"cdpo": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, and very much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings_of(kind: Any, **fields: Any) -> LossSettings:
    return LossSettings(**{"kind": kind, **NEEDED.get(str(kind), {}), **fields})


def value(kind: Any, scores: Scores, **fields: Any) -> list[float]:
    values: list[float] = settings_of(kind, **fields).loss(scores).tolist()
    return values


def near(expected: Any) -> Any:
    return pytest.approx(expected, abs=1e-6)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def spread(total: float, tokens: int, width: int = 20) -> Tensor:
    """[1, width] log-probs of `tokens` tokens that sum up to `total`."""
    return row(*[total / tokens] * tokens, *[0.0] * (width - tokens))


def extra(policy: Tensor, reference: Tensor | None = None, owner: int = 0) -> ExtraScores:
    return ExtraScores(policy, reference, torch.ones_like(policy), torch.full((len(policy),), owner))


# Log-ratios 2 for chosen and -1 for rejected, 10 and 20 tokens.
EXAMPLE = Scores(
    policy=PairValues(spread(-20, 10), spread(-30, 20)),
    reference=PairValues(spread(-22, 10), spread(-29, 20)),
    mask=PairValues((spread(-1, 10) != 0).double(), torch.ones(1, 20, dtype=torch.float64)),
    noise=torch.zeros(1),
    # No extra: no samples, no drift, no image, no judgement.
    extras=dict.fromkeys(ROLES, extra(torch.zeros(0, 20), torch.zeros(0, 20))),
)
LENGTHS = torch.tensor([[3, 2], [1, 4]])


def scores_of(logps: Tensor) -> Scores:
    """Two pairs of up to 4 tokens, and two rows of each extra; [12, 4] log-probs under the policy."""
    generator = torch.Generator().manual_seed(1)

    def reference() -> Tensor:
        return -torch.rand(2, 4, generator=generator, dtype=logps.dtype) * 3

    blocks = logps.split(2)
    masks = PairValues(*((torch.arange(4) < lengths.unsqueeze(-1)).to(logps.dtype) for lengths in LENGTHS))
    return Scores(
        policy=PairValues(blocks[0] * masks.chosen, blocks[1] * masks.rejected),
        reference=PairValues(reference() * masks.chosen, reference() * masks.rejected),
        mask=masks,
        noise=torch.zeros(2),
        collision=PairValues(reference() * masks.chosen, reference() * masks.rejected),
        changed=PairValues(*(torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0]]).to(logps.dtype) * mask for mask in masks)),
        extras={
            role: ExtraScores(block, reference(), torch.ones_like(block), torch.tensor(OWNERS[role]))
            for role, block in zip(ROLES, blocks[2:], strict=True)
        },
    )


def random_logps(dtype: torch.dtype = torch.float64) -> Tensor:
    return -torch.rand(12, 4, generator=torch.Generator().manual_seed(0), dtype=dtype) * 3 - 0.01


def lengthened(scores: Scores) -> Scores:
    """The second pair's chosen completion, its shorter one, two tokens longer; both are certain under either model."""

    def wider(values: Tensor, fill: float = 0.0) -> Tensor:
        added = torch.zeros(len(values), 2, dtype=values.dtype)
        added[1] = fill
        where = int(LENGTHS[0, 1])
        return torch.cat([values[:, :where], added, values[:, where:]], 1)

    def padded(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, 2))

    chosen = {name: getattr(scores, name) for name in ("policy", "reference", "collision", "changed")}
    changes: dict[str, Any] = {
        name: PairValues(wider(both.chosen), padded(both.rejected)) for name, both in chosen.items()
    }
    return replace(scores, mask=PairValues(wider(scores.mask.chosen, 1.0), padded(scores.mask.rejected)), **changes)


def without_side(scores: Scores, side: str) -> Scores:
    names = ("policy", "reference", "collision", "changed", "mask")
    changes: dict[str, Any] = {}
    for name in names:
        both = getattr(scores, name)
        changes[name] = both._replace(**{side: torch.zeros_like(getattr(both, side))})
    return replace(scores, **changes)


def without(scores: Scores, need: Need) -> Scores:
    if need == "reference":
        extras = {role: replace(one, reference=None) for role, one in scores.extras.items()}
        return replace(scores, reference=None, extras=extras)
    if need in ROLES:
        return replace(scores, extras={role: one for role, one in scores.extras.items() if role != need})
    changes: dict[str, Any] = {need: None}
    return replace(scores, **changes)


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("sigmoid", {}, 0.554355),
        ("hinge", {}, 0.7),
        ("ipo", {}, 4.0),
        ("ipo_averaged", {}, 22.5625),
        ("cdpo", {"label_smoothing": 0.1}, 0.584355),
        ("robust", {"label_smoothing": 0.1}, 0.516855),
        ("nca_pair", {}, 1.319407),
        ("bco_pair", {}, 1.242536),
        ("sppo", {}, 25.0),
        ("apo_zero", {}, 0.925187),
        ("apo_down", {}, 0.975391),
        ("sigmoid_norm", {"beta": 5.0}, 0.251929),
        ("simpo", {"beta": 2.5, "simpo_gamma_ratio": 0.55}, 2.694936),
        ("orpo", {}, 2.0 + 0.104206),
        ("cpo", {}, 2.313262),
        ("rpo", {}, 2.554355),
        ("rpo", {"sft_weight": 0.005}, 0.554355 + 0.01),
        ("rdpo", {}, 0.798139),
        ("mpo", {}, 0.8 * 0.554355 + 0.2 * 1.242536 + 2.0),
        ("sft", {}, 2.0),
        ("asft", {}, 2.0 + 2.252482),
        ("asft", {"asft_weight": 0.5}, 2.0 + 0.5 * 2.252482),
        # No drift: 1 - s(0.2) and 1 - s(0.1).
        ("kto", {}, 0.450166 + 0.475021),
        ("kto", {"kto_desirable": 2.0, "kto_undesirable": 0.5}, 2 * 0.450166 + 0.5 * 0.475021),
        # Without corrupted image the margin and the anchor, -log s(0.2), alone.
        ("mdpo", {}, 0.554355 + 0.598139),
        # Without further samples -log s(0.1 * 2 + 0.3 * 1).
        ("d2o", {"d2o_alpha": 0.3}, 0.474077),
        # Mean log-ratio 0.2: -log s(1 * 0.2 + 0.5).
        ("poft", {"beta": 1.0, "poft_gamma": 0.5}, 0.403186),
        # Half of the rejected's tokens are beyond 10: ratio -0.5 - 0.5 a.
        ("ld", {"ld_alpha": 0.0}, -math.log(1 / (1 + math.exp(-0.25)))),
        ("cut", {}, 2.0),
    ],
)
def test_a_loss_matches_its_hand_computed_value(kind: str, fields: dict[str, Any], expected: float) -> None:
    assert value(kind, EXAMPLE, **fields) == near([expected])


def test_the_parts_of_losses_match_hand_computed_values() -> None:
    chosen, rejected = torch.tensor([-2.0]), torch.tensor([-1.5])
    assert (losses.log_odds(chosen) - losses.log_odds(rejected)).item() == near(-0.607069)
    assert losses.orpo_loss(chosen, rejected, 0.1).item() == near(0.104206)
    assert losses.asft_loss(chosen, rejected).item() == near(2.252482)
    assert losses.kto_loss(torch.tensor(2 - 0.5), 0.1).item() == near(0.462570)
    assert losses.kto_loss(torch.tensor(0.5 - -1), 0.1).item() == near(0.462570)
    assert losses.dpo_loss(torch.tensor(2.0), 0.1).item() == near(0.598139)


def test_scores_give_sums_lengths_means_ratios_and_margin() -> None:
    assert [side.item() for side in EXAMPLE.sums] == near([-20, -30])
    assert [side.item() for side in EXAMPLE.lengths] == [10, 20]
    assert [side.item() for side in EXAMPLE.means] == near([-2, -1.5])
    assert [side.item() for side in EXAMPLE.ratios] == near([2, -1])
    assert EXAMPLE.margin.item() == near(3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    logps = random_logps().requires_grad_()
    assert torch.autograd.gradcheck(lambda one: settings_of(kind, beta=0.1).loss(scores_of(one)), (logps,))


@pytest.mark.parametrize("divergence", get_args(losses.Divergence))
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_log_probs_stay_finite_with_their_gradient(kind: str, divergence: str) -> None:
    fields = {"divergence": divergence} if "divergence" in LOSSES[kind].reads else {}  # type: ignore[index]
    for pattern in ([0.0], [-1e4], [0.0, -1e4], [-1e4, 0.0, 0.0]):
        logps = torch.tensor(pattern).repeat(48)[:48].reshape(12, 4).requires_grad_()
        scores = scores_of(logps)
        assert scores.reference is not None
        unlikely = replace(scores, reference=each(lambda reference: reference * 1e4, scores.reference))
        loss = torch.stack([settings_of(kind, **fields).loss(one) for one in (scores, unlikely)])
        loss.sum().backward()
        assert torch.isfinite(loss).all(), pattern
        assert logps.grad is not None
        assert torch.isfinite(logps.grad).all(), pattern


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_names_exactly_what_it_needs(kind: LossName) -> None:
    scores = scores_of(random_logps())
    expected = value(kind, scores)
    for need in set(get_args(Need)) - {"pairs", "lengths"}:
        if need in LOSSES[kind].needs:
            with pytest.raises((AssertionError, KeyError)):
                value(kind, without(scores, need))
        else:
            assert value(kind, without(scores, need)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_further_certain_tokens_change_a_loss_only_if_it_needs_lengths(kind: LossName) -> None:
    scores = scores_of(random_logps())
    same = value(kind, lengthened(scores)) == near(value(kind, scores))
    assert same == ("lengths" not in LOSSES[kind].needs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_needs_no_pairs_is_the_sum_of_its_sides_alone(kind: LossName) -> None:
    scores = scores_of(random_logps())
    alone = [torch.tensor(value(kind, without_side(scores, side))) for side in ("chosen", "rejected")]
    separable = (alone[0] + alone[1]).tolist() == near(value(kind, scores))
    assert separable == ("pairs" not in LOSSES[kind].needs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_heeds_exactly_the_fields_it_names(kind: LossName) -> None:
    scores = scores_of(random_logps())
    changes: dict[str, Any] = {
        "beta": 0.3, "label_smoothing": 0.2, "divergence": "jensen_shannon", "sft_weight": 2.0,
        "simpo_gamma_ratio": 1.0, "rdpo_alpha": 0.3, "ld_alpha": 0.2, "ddpo_gamma": 2.0, "kto_desirable": 2.0,
        "kto_undesirable": 2.0, "asft_weight": 2.0, "d2o_alpha": 0.3, "cut_threshold": 3.0, "cut_weight": 2.0,
        "poft_gamma": 1.0,
    }  # fmt: skip
    assert changes.keys() | {"kind", "weighting", "divergence_alpha"} == LossSettings.model_fields.keys()
    plain = settings_of(kind)
    heeded = {
        name
        for name, changed in changes.items()
        if plain.model_copy(update={name: changed}).loss(scores).tolist() != plain.loss(scores).tolist()
    }
    assert heeded == set(LOSSES[kind].reads) - {"divergence_alpha"}


@pytest.mark.parametrize("kind", KINDS)
def test_only_losses_that_say_so_heed_label_noise(kind: LossName) -> None:
    scores = scores_of(random_logps())
    noisy = value(kind, replace(scores, noise=torch.tensor([0.0, 0.3])))
    before = value(kind, scores)
    assert noisy[0] == before[0]
    assert (noisy[1] != before[1]) == LOSSES[kind].heeds_noise == settings_of(kind).heeds_noise


def test_label_noise_is_each_pairs_own_and_at_least_the_smoothing() -> None:
    twice = replace(
        EXAMPLE,
        policy=PairValues(*(side.expand(3, -1) for side in EXAMPLE.policy)),
        reference=PairValues(*(side.expand(3, -1) for side in EXAMPLE.reference or ())),
        mask=PairValues(*(side.expand(3, -1) for side in EXAMPLE.mask)),
        noise=torch.tensor([0.0, 0.1, 0.2]),
    )
    assert value("sigmoid", twice) == near([0.554355, 0.584355, 0.614355])
    assert value("cdpo", twice, label_smoothing=0.1) == near([0.584355, 0.584355, 0.614355])


def test_a_combination_is_the_weighted_sum_of_its_losses() -> None:
    scores = scores_of(random_logps())
    parts = {kind: torch.tensor(value(kind, scores)) for kind in ("sigmoid", "bco_pair", "sft", "kto")}
    combined = settings_of({"sigmoid": 0.8, "kto": 2})
    assert combined.loss(scores).tolist() == near((0.8 * parts["sigmoid"] + 2 * parts["kto"]).tolist())
    assert combined.needs == {"pairs", "reference", "mismatched"}
    assert combined.needs_reference
    assert value({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, scores) == near(value("mpo", scores))
    assert not settings_of({"simpo": 1, "sft": 1}).needs_reference


def test_wpo_weighs_a_pair_by_the_likelihood_of_both_completions_without_gradient() -> None:
    logps = row(-1.0, -2.0).requires_grad_()
    scores = Scores(
        policy=PairValues(logps, row(-3.0, 0.0)),
        reference=PairValues(row(-1.0, -2.0), row(-3.0, 0.0)),
        mask=PairValues(row(1.0, 1.0), row(1.0, 0.0)),
        noise=torch.zeros(1),
        collision=PairValues(row(-0.5, -1.5), row(-1.0, 0.0)),
    )
    settings = settings_of({"sigmoid": 2.0}, weighting="wpo")
    # Equal to the reference, 2 log 2; the means of log p - log sum p^2 are -0.5 and -2.
    weight = math.exp(-0.5 - 2.0)
    assert settings.loss(scores).tolist() == near([2 * math.log(2) * weight])
    assert settings.needs == {"pairs", "reference", "collision", "lengths"}
    settings.loss(scores).sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [near([-0.1 * weight] * 2)]


def test_ld_with_alpha_1_is_dpo() -> None:
    scores = scores_of(random_logps())
    assert value("ld", scores, ld_alpha=1.0) == near(value("sigmoid", scores))


def test_ddpo_with_gamma_1_is_length_averaged_dpo() -> None:
    scores = scores_of(random_logps())
    assert value("ddpo", scores, ddpo_gamma=1.0) == near(value("sigmoid_norm", scores))


def test_ddpo_weighs_changed_tokens() -> None:
    scores = Scores(
        policy=PairValues(row(1.0, 2.0, 3.0), row(4.0, 5.0, 0.0)),
        reference=PairValues(row(0.0, 0.0, 0.0), row(0.0, 0.0, 0.0)),
        mask=PairValues(row(1.0, 1.0, 1.0), row(1.0, 1.0, 0.0)),
        noise=torch.zeros(1),
        changed=PairValues(row(0.0, 1.0, 0.0), row(0.0, 1.0, 0.0)),
    )
    margin = (1 + 5 * 2 + 3) / 7 - (4 + 5 * 5) / 6
    assert value("ddpo", scores) == near([math.log(1 + math.exp(-0.1 * margin))])


@pytest.mark.parametrize(
    ("divergence", "fields", "margin"),
    [
        ("reverse_kl", {}, 3.0),
        # -exp(-2) + exp(1), log s(2) - log s(-1), -2 exp(-0.5 * 2) + 2 exp(0.5 * 1)
        ("forward_kl", {}, -0.135335 + 2.718282),
        ("jensen_shannon", {}, -0.126928 + 1.313262),
        ("alpha", {}, -0.735759 + 3.297443),
        ("alpha", {"divergence_alpha": 0.25}, (-math.exp(-1.5) + math.exp(0.75)) / 0.75),
    ],
)
def test_a_divergence_replaces_each_log_ratio(divergence: str, fields: dict[str, float], margin: float) -> None:
    assert value("ipo", EXAMPLE, divergence=divergence, **fields) == pytest.approx([(margin - 5) ** 2], abs=1e-5)
    assert value("sigmoid", EXAMPLE, divergence=divergence, **fields) == near([math.log(1 + math.exp(-0.1 * margin))])


def test_mdpo_compares_images_under_their_own_reference() -> None:
    corrupted = extra(row(-3.0, -4.0), row(-3.5, -3.0))  # log-ratio -0.5, and the chosen one's is 2
    expected = 0.554355 + math.log(1 + math.exp(-0.25)) + 0.598139
    assert value("mdpo", replace(EXAMPLE, extras={"corrupted": corrupted})) == near([expected])


def test_d2o_averages_chosen_and_samples() -> None:
    samples = extra(torch.tensor([[-3.0, -4.0], [-1.0, -1.0]]), torch.tensor([[-2.0, -1.0], [-1.0, -2.0]]))
    mean = (2 - 4 + 1) / 3
    expected = math.log(1 + math.exp(-(0.1 * mean + 0.2)))
    assert value("d2o", replace(EXAMPLE, extras={"sample": samples}), d2o_alpha=0.2) == near([expected])


@pytest.mark.parametrize(("reference", "drift"), [([[-2.0, -1.0], [-3.0, -4.0]], 1.5), ([[0.0, 0.0], [0.0, 0.0]], 0.0)])
def test_kto_compares_with_the_drift_of_mismatched_pairs(reference: list[list[float]], drift: float) -> None:
    policy = torch.tensor([[-2.0, -2.0], [-2.0, -1.0]], requires_grad=True)  # against the first, ratios -1 and 4
    scores = replace(EXAMPLE, extras={"mismatched": extra(policy, torch.tensor(reference))})
    expected = 1 / (1 + math.exp(0.1 * (2 - drift))) + 1 / (1 + math.exp(0.1 * (drift + 1)))
    assert value("kto", scores) == near([expected])
    assert not settings_of("kto").loss(scores).requires_grad


def cut_scores(judged: Tensor) -> Scores:
    """Chosen of one token at -1.5, rejected of probabilities 1/2, 1/4 behind a judgement."""
    plain = row(math.log(0.5), math.log(0.25))
    return Scores(
        policy=PairValues(row(-1.5, 0.0), plain),
        reference=None,
        mask=PairValues(row(1.0, 0.0), row(1.0, 1.0)),
        noise=torch.zeros(1),
        extras={"judged": extra(judged)},
    )


def test_cut_unlearns_tokens_that_the_judgement_makes_likelier() -> None:
    scores = cut_scores(row(math.log(0.52), math.log(0.5)))  # 1.04 and 2 times as likely
    behind_judgement = -(math.log(0.52) + math.log(0.5)) / 2
    plain = (-math.log(0.5) - 0.5 * math.log(0.75)) / 2
    assert value("cut", scores, cut_weight=0.5) == near([1.5 + (plain + behind_judgement) / 2])


def test_cut_keeps_a_completion_without_inappropriate_tokens() -> None:
    scores = cut_scores(row(math.log(0.5), math.log(0.25)))
    assert value("cut", scores) == near([1.5 + 2 * (math.log(2) + math.log(4)) / 2])


def test_extras_add_to_the_pair_that_owns_them() -> None:
    scores = scores_of(random_logps())
    alone = extra(row(-9.0), row(-1.0), owner=1)
    roles: dict[str, ExtraRole] = {"mdpo": "corrupted", "d2o": "sample", "cut": "judged"}
    for kind, role in roles.items():
        before = value(kind, replace(scores, extras={role: extra(torch.zeros(0, 1), torch.zeros(0, 1))}))
        after = value(kind, replace(scores, extras={role: alone}))
        assert after[0] == before[0]
        assert after[1] != before[1]


def test_a_larger_margin_lowers_the_dpo_loss() -> None:
    values = losses.dpo_loss(torch.tensor([-3.0, 0.0, 3.0]), beta=0.1)
    assert values[0] > values[1] > values[2]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "sigmoyd"}, "loss.kind is 'sigmoyd', but must be one of sigmoid, .*; did you mean sigmoid?"),
        ({"kind": {"sigmoid": 1.0, "stf": 1.0}}, "loss.kind is 'stf', .*; did you mean sft?"),
        ({"kind": 3}, "loss.kind is 3, but must be the name of a loss"),
        ({"kind": {}}, "loss.kind is empty: name at least one loss"),
        ({"kind": {"sigmoid": 0.0}}, "loss.kind.sigmoid is 0.0, but a weight must be a number above 0"),
        ({"kind": {"sigmoid": -1}}, "loss.kind.sigmoid is -1, but"),
        ({"kind": {"sigmoid": True}}, "loss.kind.sigmoid is True, but"),
        ({"kind": {"sigmoid": "much"}}, "loss.kind.sigmoid is 'much', but"),
        ({"kind": "cdpo"}, "loss.label_smoothing is 0, but loss.kind cdpo needs"),
        ({"kind": {"sft": 1.0, "robust": 1.0}}, "loss.label_smoothing is 0, but loss.kind robust needs"),
        ({"label_smoothing": 0.1}, "loss.label_smoothing is 0.1, but loss.kind sigmoid does not heed it: .* cdpo, rob"),
        ({"kind": "sft", "beta": 0.2}, "loss.beta is 0.2, but loss.kind sft does not heed it"),
        ({"kind": "cpo", "simpo_gamma_ratio": 1}, "loss.simpo_gamma_ratio is 1.0, but loss.kind cpo .* from simpo"),
        ({"kind": {"cpo": 1, "kto": 1}, "ld_alpha": 1}, "loss.ld_alpha is 1.0, but loss.kind cpo, kto does not"),
        ({"kind": "simpo", "divergence": "forward_kl"}, "loss.divergence is forward_kl, but loss.kind simpo does not"),
        ({"divergence_alpha": 0.3}, "loss.divergence_alpha is 0.3, but loss.divergence reverse_kl does not heed it"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_in_one_sentence(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        LossSettings(**fields)
    assert "\n" not in str(error.value)


def test_a_field_that_one_term_heeds_is_accepted() -> None:
    settings = settings_of({"sft": 1, "simpo": "1e-1"}, simpo_gamma_ratio=0.3)
    assert settings.terms == {"sft": 1.0, "simpo": 0.1}
    assert LossSettings(**settings.model_dump()) == settings


def test_every_name_has_a_loss() -> None:
    assert set(get_args(LossName)) == set(LOSSES)


def test_robust_dpo_without_wrong_labels_is_dpo() -> None:
    assert losses.robust_loss(torch.tensor([3.0]), 0.1, 0.0).item() == near(0.554355)
