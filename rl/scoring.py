"""The one function that computes log-probs of completions, for policy and reference alike, seeing the images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rl.images import CanonicalImage
from rl.types import Completion, Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import ProcessorMixin

IGNORED = -100


@dataclass(frozen=True)
class ScoredSequence:
    """Tokens to score: a prompt with its image placeholders expanded, and a completion."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    images: tuple[CanonicalImage, ...]

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def span(self) -> slice:
        """Where the completion's tokens lie in a row of `token_logps`."""
        return slice(len(self.prompt_token_ids) - 1, len(self) - 1)


def to_sequence(prompt: Prompt, completion: Completion) -> ScoredSequence:
    """A completion as tokens to score, exactly those the engine saw and sampled."""
    return ScoredSequence(completion.prompt_token_ids, completion.token_ids, prompt.images)


class Batch(NamedTuple):
    """Right-padded sequences. `labels` is the token id at completion positions and `IGNORED` elsewhere."""

    input_ids: "Tensor"  # [batch, length]
    attention_mask: "Tensor"  # [batch, length]
    labels: "Tensor"  # [batch, length]
    images: dict[str, "Tensor"]  # what the image processor gives: pixel_values, sizes
    fillers: int  # rows at the end that are there only to run the vision tower


def collate(sequences: Sequence[ScoredSequence], processor: "ProcessorMixin", run_vision: bool) -> Batch:
    """Pad sequences to the longest and process their images.

    With `run_vision`, a batch without any image gets one filler row with a blank image: under ZeRO-3 every
    rank must gather the vision tower's weights in every pass, or the others wait for ever.
    """
    import torch

    rows = list(sequences)
    fillers = 0
    if run_vision and not any(row.images for row in rows):
        rows.append(_filler(processor))
        fillers = 1
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), _pad_id(processor))
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row.prompt_token_ids + row.token_ids)
        attention_mask[index, : len(row)] = 1
        labels[index, len(row.prompt_token_ids) : len(row)] = torch.tensor(row.token_ids)
    pictures = [image.open() for row in rows for image in row.images]
    images = dict(processor.image_processor(images=pictures, return_tensors="pt")) if pictures else {}
    return Batch(input_ids, attention_mask, labels, images, fillers)


class TokenScores(NamedTuple):
    """Of every completion token given all before it and the images; 0 at other positions. [batch, length - 1] in
    float32, position t about the token at t + 1."""

    logps: "Tensor"
    collision: "Tensor | None"
    """log sum_v p(v)^2: the log-probability that two draws from the policy agree there."""


def token_logps(model: "torch.nn.Module", batch: Batch, device: "torch.device") -> "Tensor":
    """See `TokenScores.logps`."""
    return token_scores(model, batch, device, with_collision=False).logps


def token_scores(model: "torch.nn.Module", batch: Batch, device: "torch.device", with_collision: bool) -> TokenScores:
    """Scores of every completion token, fillers left out. Only positions that predict one pass through the language
    head."""
    from torch.nn import functional as F

    images = placed(batch.images, device, next(model.parameters()).dtype)
    labels = batch.labels[:, 1:].to(device)
    first = int((batch.labels != IGNORED).any(dim=0).nonzero()[0]) - 1
    logits = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        logits_to_keep=batch.labels.shape[1] - first,
        use_cache=False,
        **images,
    ).logits[:, :-1]
    mask = labels != IGNORED
    rows = len(labels) - batch.fillers
    distribution = F.log_softmax(logits.float(), dim=-1)
    kept = distribution.gather(-1, labels[:, first:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    logps = F.pad(kept, (first, 0)) * mask
    anchor = logps[rows:].sum() * 0  # keeps the filler's graph, so that backward runs the tower too
    if not with_collision:
        return TokenScores(logps[:rows] + anchor, None)
    collision = F.pad((2 * distribution.detach()).logsumexp(-1), (first, 0)) * mask
    return TokenScores(logps[:rows] + anchor, collision[:rows])


def placed(inputs: "Mapping[str, Tensor]", device: "torch.device", dtype: "torch.dtype") -> "dict[str, Tensor]":
    """A model's inputs on its device, those that are no whole numbers in its precision."""
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def by_completion(values: "Tensor", sequences: Sequence[ScoredSequence]) -> "Tensor":
    """Rows of `TokenScores` cut to their completions and padded with 0: [sequences, longest completion]."""
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence([row[one.span] for row, one in zip(values, sequences, strict=True)], batch_first=True)


def _pad_id(processor: "ProcessorMixin") -> int:
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _filler(processor: "ProcessorMixin") -> ScoredSequence:
    from PIL import Image

    from rl.images import canonicalise

    size = processor.image_processor.size
    side = size.get("shortest_edge") or size.get("height") or 32
    blank = canonicalise(Image.new("RGB", (side, side)), "filler")
    ids = processor(text=processor.image_token, images=[blank.open()], add_special_tokens=False).input_ids[0]
    return ScoredSequence(tuple(ids), (_pad_id(processor),), (blank,))
