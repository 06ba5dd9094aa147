"""Masked workers: Ray actors that write while the language model may not attend to hidden image embeddings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cluster.connect import ActorResources, log_to_file
from cluster.errors import WeightSyncError
from cluster.settings import Settings
from rl.batching import plan_microbatches
from rl.engine import prepare_worker
from rl.policy import PolicySettings
from rl.render import answer_token_ids, image_token_counts, prompt_token_ids
from rl.rollout import SamplingSettings, placeholder_tokens, request_seed
from rl.scoring import placed
from rl.sight import Continuation, view_inputs, views

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from torch import Tensor
    from transformers import ProcessorMixin


class MaskedSettings(Settings):
    """The actors that write with masked attention."""

    workers: int = Field(1, ge=1)
    """Copies of the policy; they share the continuations."""
    resources: ActorResources = ActorResources(cpus=0.25, threads=2)
    """Of one copy."""
    tokens_per_batch: int = Field(8192, ge=1)
    """Padded tokens of prompts, prefixes and continuations that are decoded together."""


@dataclass(frozen=True)
class Row:
    """A continuation's tokens before it starts, image placeholders expanded, and which of them are attended to."""

    ids: tuple[int, ...]
    attended: np.ndarray  # bool [len(ids)]


class MaskedWorker:
    """A copy of the policy in transformers, kept up to date by `load`. Used as a Ray actor.

    vLLM has no mask over single tokens of a sequence, which is why this is not an engine.
    """

    def __init__(self, settings: MaskedSettings, policy: PolicySettings, model: str, log: str):
        log_to_file(Path(log))
        prepare_worker(settings.resources.threads)
        import torch

        from rl.policy import load_model, load_processor

        self._settings = settings
        self._max_length = policy.max_length
        self._device = torch.device("cuda" if settings.resources.gpus else "cpu")
        self._processor: Any = load_processor(model)
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._model: Any = load_model(model, policy.precision).to(self._device).requires_grad_(False)
        self._banned = placeholder_tokens(self._model.config)
        self._ends = _end_tokens(self._model, self._tokenizer)
        self._full_stops = sorted(id for token, id in self._tokenizer.get_vocab().items() if "." in token)

    def load(self, weights: "Mapping[str, Tensor]") -> None:
        """Take over new weights by their in-memory names; those not given stay.

        Raises:
            WeightSyncError: the model has no weight of a given name.
        """
        unknown = self._model.load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            raise WeightSyncError(f"the masked copy of the policy has no weights {sorted(unknown)[:3]}")

    def go_on(self, requests: Sequence[Continuation], sampling: SamplingSettings, seed: int) -> list[str]:
        """Write each answer on from its prefix, one continuation each, with hidden image embeddings masked.

        No token attends to a hidden embedding; it keeps its place, so the others keep theirs. The texts come
        without the prefix and without outer space.
        """
        rows = [_row(request, self._processor, self._banned) for request in requests]
        texts = [""] * len(requests)
        (passes,) = plan_microbatches(
            [len(row.ids) + sampling.max_tokens for row in rows], 1, self._settings.tokens_per_batch
        )
        for indices in passes:
            batch = [requests[index] for index in indices]
            written = self._write([rows[index] for index in indices], batch, sampling, seed)
            for index, request, ids in zip(indices, batch, written.tolist(), strict=True):
                text = self._tokenizer.decode(ids[: self._max_length - len(rows[index].ids)], skip_special_tokens=True)
                before, stop, _ = text.partition(".") if request.to_sentence_end else (text, "", "")
                texts[index] = (before + stop).strip()
        return texts

    def _write(
        self, rows: Sequence[Row], requests: Sequence[Continuation], sampling: SamplingSettings, seed: int
    ) -> "Tensor":
        """New tokens [batch, length], padded behind each row's end."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        images = [view for request in requests for view in views(request.prompt, request.sight)]
        inputs = _left_padded(rows, self._tokenizer.pad_token_id or 0) | (
            view_inputs(images, self._processor) if images else {}
        )
        inputs = placed(inputs, self._device, self._model.dtype)
        self._model.generation_config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            eos_token_id=self._ends,
            pad_token_id=self._tokenizer.pad_token_id or 0,
            suppress_tokens=self._banned or None,
        )
        seeds = [request_seed(seed, request.id) for request in requests]
        one_sentence = torch.tensor([request.to_sentence_end for request in requests], device=self._device)
        full_stops = torch.tensor(self._full_stops, device=self._device)
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs,
                logits_processor=LogitsProcessorList(_draw(sampling, seeds, self._device)),
                stopping_criteria=StoppingCriteriaList(
                    [lambda ids, scores, **_: one_sentence & torch.isin(ids[:, -1], full_stops)]
                ),
            )
        return tokens[:, inputs["input_ids"].shape[1] :]


def start_masked(settings: MaskedSettings, policy: PolicySettings, model: str, logs: Path) -> list["ActorHandle"]:
    """Start the actors; `logs` is a local folder."""
    import ray

    actor: Any = ray.remote(MaskedWorker).options(num_cpus=settings.resources.cpus, num_gpus=settings.resources.gpus)
    return [
        actor.remote(settings, policy, model, str(logs / f"masked-{index}.log")) for index in range(settings.workers)
    ]


def _row(request: Continuation, processor: "ProcessorMixin", placeholders: Sequence[int]) -> Row:
    prompt = prompt_token_ids(request.prompt, processor, expand_images=True)
    prefix = answer_token_ids(request.prefix.rstrip(), processor)
    attended = np.ones(len(prompt) + len(prefix), dtype=bool)
    counts = image_token_counts(request.prompt, processor)
    if counts:
        visible = [request.sight.visible(count, index) for index, count in enumerate(counts)]
        attended[np.flatnonzero(np.isin(prompt, placeholders))] = np.concatenate(visible)
    return Row((*prompt, *prefix), attended)


def _left_padded(rows: Sequence[Row], pad: int) -> "dict[str, Tensor]":
    """The rows with their ends in line. Positions count every token of a row, attended to or not."""
    import torch

    length = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    position_ids = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        start = length - len(row.ids)
        input_ids[index, start:] = torch.tensor(row.ids)
        attention_mask[index, start:] = torch.from_numpy(row.attended)
        position_ids[index, start:] = torch.arange(len(row.ids))
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def _draw(sampling: SamplingSettings, seeds: Sequence[int], device: Any) -> list[Callable[..., Any]]:
    """Logits processors after which the largest logit is a draw from the policy; none for greedy writing.

    Each row has a generator of its own, so that what it draws does not depend on the batch. The largest of
    logits with Gumbel noise is distributed as their softmax.
    """
    import torch
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0:
        return []
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def add_gumbel(input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()

    truncated = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return [TemperatureLogitsWarper(sampling.temperature), *truncated, add_gumbel]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """What ends a turn: the tokenizer's token and those of the checkpoint's generation config, as in vLLM."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None})
