"""Losses against values worked out by hand."""

import pytest
import torch

from rl.losses import LOSSES, LossSettings, dpo_loss, ipo_loss, log_ratio_margin
from rl.types import PairValues

# log-ratios 2 for chosen and -1 for rejected: margin 3
POLICY = PairValues(torch.tensor([-20.0]), torch.tensor([-30.0]))
CERTAIN = torch.zeros(1)
REFERENCE = PairValues(torch.tensor([-22.0]), torch.tensor([-29.0]))


def test_margin_is_the_difference_of_log_ratios() -> None:
    assert log_ratio_margin(POLICY, REFERENCE).item() == 3.0


def test_dpo_matches_hand_computed_value() -> None:
    assert dpo_loss(torch.tensor([3.0]), beta=0.1).item() == pytest.approx(0.554355, abs=1e-6)


def test_label_smoothing_matches_hand_computed_value() -> None:
    assert dpo_loss(torch.tensor([3.0]), beta=0.1, label_smoothing=0.1).item() == pytest.approx(0.584355, abs=1e-6)


def test_label_noise_is_each_pairs_own() -> None:
    loss = LossSettings(kind="sigmoid", beta=0.1).build()
    twice = (
        PairValues(*(values.expand(2) for values in POLICY)),
        PairValues(*(values.expand(2) for values in REFERENCE)),
    )
    assert loss(*twice, torch.tensor([0.0, 0.1])).tolist() == pytest.approx([0.554355, 0.584355], abs=1e-6)


def test_ipo_matches_hand_computed_value() -> None:
    assert ipo_loss(torch.tensor([3.0]), beta=0.1).item() == pytest.approx(4.0)


def test_settings_build_the_named_loss_with_its_parameters() -> None:
    smoothed = LossSettings(kind="sigmoid", beta=0.1, label_smoothing=0.1).build()
    assert smoothed(POLICY, REFERENCE, CERTAIN).item() == pytest.approx(0.584355, abs=1e-6)
    assert LossSettings(kind="ipo", beta=0.1).build()(POLICY, REFERENCE, CERTAIN).item() == pytest.approx(4.0)


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_extreme_margins_stay_finite_with_their_gradient(kind: str) -> None:
    margin = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], requires_grad=True)
    loss = LOSSES[kind](margin, torch.zeros_like(margin), LossSettings(kind=kind))  # type: ignore[index,arg-type]
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert margin.grad is not None
    assert torch.isfinite(margin.grad).all()


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    settings = LossSettings(kind=kind, beta=0.3)  # type: ignore[arg-type]
    margin = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: LOSSES[settings.kind](m, torch.zeros_like(m), settings), (margin,))


def test_a_larger_margin_lowers_the_dpo_loss() -> None:
    losses = dpo_loss(torch.tensor([-3.0, 0.0, 3.0]), beta=0.1)
    assert losses[0] > losses[1] > losses[2]
