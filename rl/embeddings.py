"""Image embeddings of a running vLLM engine: taken out of it, and given back to it in part."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rl.scoring import placed
from rl.sight import View, view_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import ProcessorMixin
    from vllm import LLM

VIEWS_PER_PASS = 8
"""Images that pass through the vision tower together."""


def embed_views(engine: "LLM", views: Sequence[View], processor: "ProcessorMixin") -> "dict[View, Tensor]":
    """What the engine's own tower and projector make of each view, with their present weights: [tokens, hidden]."""
    embeddings: dict[View, Tensor] = {}
    for start in range(0, len(views), VIEWS_PER_PASS):
        batch = views[start : start + VIEWS_PER_PASS]
        inputs = view_inputs(batch, processor)
        first_rank, *_ = engine.apply_model(functools.partial(_embed, inputs=inputs))
        embeddings.update(zip(batch, first_rank, strict=True))
    return embeddings


def accept_any_length(model: Any) -> None:
    """Let given embeddings through a vLLM model as they are.

    vLLM's LLaVA checks that all images of a batch have the same number of embeddings, and stops the engine if not.
    """
    encode = model.embed_multimodal

    def embed_multimodal(**inputs: Any) -> Any:
        given = inputs.get("image_embeds")
        return encode(**inputs) if given is None else list(given)

    model.embed_multimodal = embed_multimodal


def _embed(model: Any, inputs: "dict[str, Tensor]") -> "list[Tensor]":
    """The embeddings of each image, on the CPU; runs inside the engine."""
    import torch

    weight = next(model.parameters())
    with torch.inference_mode():
        embeddings = model.embed_multimodal(**placed(inputs, weight.device, weight.dtype))
        return [embedding.cpu() for embedding in embeddings]
