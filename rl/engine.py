"""The DeepSpeed ZeRO engine under a Ray Train worker: made from settings, stepped, and read out."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from cluster.settings import Settings
from rl.policy import Precision

if TYPE_CHECKING:
    import torch


class OptimizerSettings(Settings):
    """AdamW, its schedule, and how DeepSpeed spreads the work."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to zero along a cosine."""
    warmup_steps: int = Field(2, ge=0)
    """Optimizer steps over which the learning rate rises from zero."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    tokens_per_microbatch: int = Field(4096, ge=1)
    """Padded tokens in one forward pass of one worker; more pairs are accumulated over several passes."""
    zero_stage: Literal[1, 2, 3] = 3
    """What DeepSpeed shards: optimizer state, also gradients, also weights. 3 for models that do not fit."""
    offload: bool = False
    """Keep optimizer state in CPU memory (GPU clusters only)."""


def learning_rate_factor(settings: OptimizerSettings, total_steps: int) -> Callable[[int], float]:
    """The schedule as a factor of the peak learning rate, by optimizer step."""

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        if settings.schedule == "constant":
            return 1.0
        progress = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


class StepResult(NamedTuple):
    """What one optimizer step gave."""

    loss: float
    """Sum of this rank's losses."""
    grad_norm: float
    """Global norm of the gradient before clipping."""


class TrainEngine:
    """One rank of a DeepSpeed engine. Every rank calls every method, equally often and in the same order."""

    def __init__(self, model: "torch.nn.Module", settings: OptimizerSettings, precision: Precision, total_steps: int):
        import deepspeed
        import torch
        from ray.train.torch import get_device

        self.device = get_device()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(settings, total_steps))
        self._engine, *_ = deepspeed.initialize(
            model=model.train(),
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=deepspeed_config(settings, precision),
            dist_init_required=False,
        )

    @property
    def module(self) -> "torch.nn.Module":
        """The sharded module; call it on every rank together."""
        return self._engine

    def step(self, losses: Iterator["torch.Tensor"], passes: int) -> "StepResult":
        """Accumulate the gradients of `passes` losses, one per forward pass, and update.

        Losses are taken as they are: the caller divides by the number of pairs in the whole batch and
        multiplies by the number of ranks, over which DeepSpeed averages. Each loss is asked for only after the
        backward pass of the one before: one graph is alive at a time, and ZeRO-3 loses gradients otherwise.
        """
        total = 0.0
        for index in range(passes):
            self._engine.set_gradient_accumulation_boundary(index == passes - 1)
            loss = next(losses)
            total += float(loss.detach())
            self._engine.backward(loss, scale_wrt_gas=False)
            self._engine.step()
        return StepResult(total, float(self._engine.get_global_grad_norm() or 0.0))

    @property
    def learning_rate(self) -> float:
        return float(self._engine.get_lr()[0])

    def full_weights(self, names: Iterable[str]) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield (name, whole tensor) one at a time; gathering is a collective of all ranks.

        The tensor is valid only until the next one is asked for.
        """
        parameters = dict(self._engine.module.named_parameters(remove_duplicate=False))
        buffers = dict(self._engine.module.named_buffers())
        for name in names:
            if name in buffers:
                yield name, buffers[name]
                continue
            with gathered(parameters[name]):
                yield name, parameters[name].data

    def save(self, folder: str, state: dict[str, Any]) -> None:
        """Write this rank's shards of trained weights and optimizer to `folder`; frozen weights are the start's."""
        self._engine.save_checkpoint(
            folder, tag="state", client_state=state, save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: str) -> dict[str, Any]:
        """Restore what `save` wrote into an engine that has not stepped yet; returns its `state`."""
        _, state = self._engine.load_checkpoint(folder, tag="state", load_module_strict=False)
        return state


@contextmanager
def gathered(*parameters: "torch.Tensor") -> Iterator[None]:
    """Hold the whole of ZeRO-3 parameters on every rank; does nothing to unsharded ones."""
    if not hasattr(parameters[0], "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


def deepspeed_config(settings: OptimizerSettings, precision: Precision) -> dict[str, Any]:
    """DeepSpeed's own config for our settings."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bfloat16"},
        "wall_clock_breakdown": False,
    }


def prepare_worker(threads: int) -> None:
    """Settings that every training process needs before torch does work."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(threads)
        import deepspeed.ops

        # Compiled at first use, it needs a C++ compiler, and a process killed meanwhile leaves a lock on which every
        # later one waits for ever. Gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
