"""Restricted sight: which embeddings are seen, and the noise."""

import numpy as np
import pytest
import torch

from rl.sight import Sight, diffuse, noise_scale


def test_the_share_that_is_seen_is_one_minus_the_threshold() -> None:
    seen = [Sight(seed, 0.99, 0).visible(2880).sum() for seed in range(50)]
    assert np.mean(seen) == pytest.approx(28.8, abs=3)
    assert Sight(0, 0.3, 0).visible(10_000).mean() == pytest.approx(0.7, abs=0.02)


def test_threshold_0_sees_all_and_1_sees_nothing() -> None:
    assert Sight(3, 0.0, 0).visible(576).all()
    assert not Sight(3, 1.0, 0).visible(576).any()


def test_a_lower_threshold_only_adds_to_what_is_seen() -> None:
    high, low = Sight(3, 0.9, 0).visible(576), Sight(3, 0.8, 0).visible(576)
    assert low[high].all()
    assert low.sum() > high.sum()


def test_what_is_seen_is_settled_by_seed_and_image() -> None:
    sight = Sight(7, 0.5, 0)
    assert sight.visible(100).dtype == bool
    assert (sight.visible(100) == Sight(7, 0.5, 500).visible(100)).all()
    assert (sight.visible(100, image=1) == sight.visible(100, image=1)).all()
    assert (sight.visible(100) != sight.visible(100, image=1)).any()
    assert (sight.visible(100) != Sight(8, 0.5, 0).visible(100)).any()


@pytest.mark.parametrize(
    ("step", "scale"),
    [(0, 1.0), (100, 0.9983), (200, 0.9939), (300, 0.9810), (400, 0.9449), (500, 0.8630), (999, 0.2850)],
)
def test_noise_scale_is_that_of_the_published_schedule(step: int, scale: float) -> None:
    assert noise_scale(step) == pytest.approx(scale, abs=5e-5)


def test_diffusion_mixes_pixels_and_unit_noise() -> None:
    ones = torch.ones(2, 3, 64, 64)
    noised = diffuse(ones, 500, seed=1)
    assert noised.shape == ones.shape
    assert float(noised.mean()) == pytest.approx(0.863, abs=0.02)
    assert float(noised.std()) == pytest.approx((1 - 0.863**2) ** 0.5, abs=0.02)


def test_diffusion_is_settled_by_the_seed_and_leaves_its_input_and_the_global_generator_alone() -> None:
    pixels = torch.zeros(3, 8, 8)
    state = torch.get_rng_state()
    assert torch.equal(diffuse(pixels, 500, 1), diffuse(pixels, 500, 1))
    assert not torch.equal(diffuse(pixels, 500, 1), diffuse(pixels, 500, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not pixels.any()


def test_diffusion_keeps_the_precision_and_has_the_same_noise_in_each() -> None:
    half = diffuse(torch.zeros(3, 8, 8, dtype=torch.bfloat16), 500, 1)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, diffuse(torch.zeros(3, 8, 8), 500, 1).bfloat16())


def test_step_0_leaves_the_pixels_as_they_are() -> None:
    pixels = torch.rand(3, 8, 8)
    assert torch.equal(diffuse(pixels, 0, 1), pixels)
