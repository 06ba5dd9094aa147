"""Schedules and DeepSpeed's config."""

import pytest

from rl.engine import OptimizerSettings, deepspeed_config, learning_rate_factor
from rl.weights import max_difference


def test_warm_up_rises_linearly_and_then_stays() -> None:
    factor = learning_rate_factor(OptimizerSettings(warmup_steps=4, schedule="constant"), 20)
    assert [factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_peak_to_zero() -> None:
    factor = learning_rate_factor(OptimizerSettings(warmup_steps=2, schedule="cosine"), 12)
    assert factor(2) == 1.0
    assert factor(7) == pytest.approx(0.5)
    assert factor(12) == pytest.approx(0.0, abs=1e-9)
    assert factor(50) == pytest.approx(0.0, abs=1e-9)


def test_settings_reach_deepspeed() -> None:
    config = deepspeed_config(OptimizerSettings(max_grad_norm=0.5, offload=True), "bfloat16")
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["bf16"] == {"enabled": True}
    assert config["gradient_clipping"] == 0.5


def test_the_probe_takes_the_largest_difference_and_lets_no_nan_pass() -> None:
    assert max_difference([[-1.0, -2.0], [-3.0]], [[-1.0, -2.5], [-3.1]]) == pytest.approx(0.5)
    broken = max_difference([[-1.0]], [[float("nan")]])
    assert not broken <= 1e-4
