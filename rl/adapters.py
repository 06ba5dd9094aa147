"""Low-rank adapters: their kinds, how they are attached, switched off, and turned into what others can load."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cluster.settings import Settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

AdapterKind = Literal["lora", "rslora", "dora", "pissa"]
ADAPTER = "default"
ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` may be."""


class LoraSettings(Settings):
    """Low-rank adapters through PEFT instead of training all weights."""

    kind: AdapterKind = "lora"
    """`lora`: W + s B A, with s = alpha / rank and B starting at 0 (arXiv 2106.09685); `rslora`: s = alpha /
    sqrt(rank), so that high ranks learn as fast (2312.03732); `dora`: also the length of each row of W + s B A is
    learned (2402.09353); `pissa`: B A starts as the principal singular parts of W, and the rest is frozen
    (2404.02948)."""
    rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(32, ge=1)
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters; 0 keeps the trainer equal to the sampler."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers of the language model that get an adapter."""

    @property
    def published_rank(self) -> int | None:
        """Rank of the plain LoRA that engines get (PiSSA's has its start subtracted); None where they get whole
        weights, since vLLM refuses DoRA."""
        if self.kind == "dora":
            return None
        return 2 * self.rank if self.kind == "pissa" else self.rank


def attach(model: "PreTrainedModel", settings: LoraSettings, target_modules: str | list[str]) -> "PeftModel":
    """The model with new adapters, the only parameters that take gradients.

    PiSSA needs the weights in memory, unsharded. It takes the same singular parts in every process and after every
    start; each layer keeps them as buffers that no checkpoint holds, for `plain_lora` to subtract.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_modules,
        use_rslora=settings.kind == "rslora",
        use_dora=settings.kind == "dora",
        init_lora_weights="pissa_niter_4" if settings.kind == "pissa" else True,
    )
    if settings.kind != "pissa":
        return get_peft_model(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the randomised singular value decomposition
        adapted = get_peft_model(model, config)
    for layer in adapted_layers(adapted).values():
        for side in ("A", "B"):
            start = getattr(layer, f"lora_{side}")[ADAPTER].weight.detach().clone()
            layer.register_buffer(f"start_{side}", start, persistent=False)
    return adapted


def is_adapted(model: "torch.nn.Module") -> bool:
    """Whether adapters are attached to the model."""
    return hasattr(model, "peft_config")


def adapted_layers(model: "torch.nn.Module") -> "dict[str, torch.nn.Module]":
    """The layers that carry an adapter, by name."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_magnitude_vector")}


def plain_names(model: "torch.nn.Module") -> dict[str, str]:
    """Map each weight's name in the model before it was adapted to its name now; without adapters they are the same."""
    if not is_adapted(model):
        return {name: name for name in model.state_dict()}
    kept = [name for name in model.state_dict() if ".lora_" not in name]
    return {name.removeprefix("base_model.model.").replace(".base_layer.", "."): name for name in kept}


@contextmanager
def adapters_off(model: "torch.nn.Module") -> Iterator[None]:
    """Inside, the model computes what it did before it was adapted: without adapters, dropout or gradient.

    Not for PiSSA, whose frozen weights are only the residual.
    """
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
            yield
    finally:
        model.train(was_training)


def merged(layer: Any) -> "torch.Tensor":
    """The layer's weight and adapter as one matrix: W + s B A, and of DoRA m (W + s B A) / ||W + s B A|| row by row
    (arXiv 2402.09353, equation 5)."""
    import torch

    with torch.no_grad():
        weight = layer.get_base_layer().weight + layer.get_delta_weight(ADAPTER)
        if ADAPTER not in layer.lora_magnitude_vector:
            return weight
        length = torch.linalg.norm(weight, dim=1)
        return (layer.lora_magnitude_vector[ADAPTER].weight / length).unsqueeze(1) * weight


def plain_lora(
    model: "torch.nn.Module", tensors: "Mapping[str, torch.Tensor]", config: Mapping[str, Any]
) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
    """PiSSA's W - s B0 A0 + s B A as a LoRA of twice the rank on the untouched W: A' = [A; A0], B' = [B, -B0], and
    twice the alpha, so that s stays. `tensors` and `config` are the adapter's in PEFT's format; `model` has the start.
    """
    import torch

    start = dict(model.named_buffers())
    plain = {}
    for name, tensor in tensors.items():
        layer, side, _ = name.rsplit(".", 2)
        first = start[f"{layer}.{side.replace('lora', 'start')}"].to(tensor)
        plain[name] = torch.cat([tensor, first]) if side == "lora_A" else torch.cat([tensor, -first], dim=1)
    doubled = {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"], "init_lora_weights": True}
    return plain, {**config, **doubled}
