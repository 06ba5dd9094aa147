"""How alike two texts are: by their words, or by the embeddings of a sentence encoder."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from cluster.errors import DataError, first_line
from cluster.settings import LocalPath, Settings

if TYPE_CHECKING:
    from torch import Tensor

_WORD = re.compile(r"\w+(?:['\u2019.]\w+)*")


class Similarity(Protocol):
    """Compares texts two by two."""

    def __call__(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        """From 0, nothing in common, to 1, the same, for each text and the other one at its place."""


class LexicalSimilarity(Settings):
    """Cosine of the counts of words and of neighbouring pairs of words. Needs no model, and knows no synonyms."""

    kind: Literal["lexical"] = "lexical"
    """Which similarity."""

    def build(self) -> Similarity:
        """See `lexical_similarity`."""
        return lexical_similarity


class EmbeddingSimilarity(Settings):
    """Cosine of sentence embeddings, the mean over a text's tokens, as in BDHS (arXiv 2407.02477). Runs on the CPU."""

    kind: Literal["embedding"]
    """Which similarity."""
    model: LocalPath = "sentence-transformers/all-mpnet-base-v2"
    """Hugging Face name or folder of a sentence encoder with mean pooling; the default is the paper's."""
    max_tokens: int = Field(384, ge=1)
    """Tokens of a text that are compared, the rest is cut off; 384 is what the default model was made for."""
    batch_size: int = Field(32, ge=1)
    """Texts in one forward pass."""

    def build(self) -> Similarity:
        """The loaded encoder.

        Raises:
            DataError: it cannot be loaded.
        """
        return Encoder(self)


SimilaritySettings = Annotated[LexicalSimilarity | EmbeddingSimilarity, Field(discriminator="kind")]


def lexical_similarity(texts: Sequence[str], others: Sequence[str]) -> list[float]:
    """Cosine of the counts of words and of neighbouring pairs of words, lower-cased; without words, 1 if both are."""
    return [_cosine(_terms(text), _terms(other)) for text, other in zip(texts, others, strict=True)]


def _terms(text: str) -> Counter[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return Counter([*((word,) for word in words), *pairwise(words)])


def _cosine(one: Counter[tuple[str, ...]], other: Counter[tuple[str, ...]]) -> float:
    if not one or not other:
        return float(one == other)
    common = sum(count * other[term] for term, count in one.items())
    return common / sqrt(_square(one) * _square(other))


def _square(counts: Counter[tuple[str, ...]]) -> int:
    return sum(count * count for count in counts.values())


class Encoder:
    """A sentence encoder as a similarity."""

    def __init__(self, settings: EmbeddingSimilarity):
        self._batch_size = settings.batch_size
        self._tokenizer, self._model = _load(settings.model)
        self._max_tokens = min(settings.max_tokens, self._tokenizer.model_max_length)

    def __call__(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        """See `Similarity`."""
        from torch.nn.functional import cosine_similarity

        if len(texts) != len(others):
            raise ValueError(f"{len(texts)} texts cannot be compared with {len(others)}")
        if not texts:
            return []
        embeddings = self._embed([*texts, *others])
        cosines = cosine_similarity(embeddings[: len(texts)], embeddings[len(texts) :])
        return cosines.clamp(0, 1).tolist()

    def _embed(self, texts: Sequence[str]) -> "Tensor":
        """The mean over its tokens' last hidden states of each text: float [texts, hidden]."""
        import torch

        embeddings = []
        for start in range(0, len(texts), self._batch_size):
            batch = self._tokenizer(
                list(texts[start : start + self._batch_size]),
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            )
            with torch.inference_mode():
                hidden = self._model(**batch).last_hidden_state
            embeddings.append(mean_pool(hidden, batch["attention_mask"]))
        return torch.cat(embeddings)


def mean_pool(hidden: "Tensor", mask: "Tensor") -> "Tensor":
    """The mean of hidden states [batch, tokens, hidden] where the mask [batch, tokens] is 1: [batch, hidden]."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _load(model: str) -> tuple[Any, Any]:
    """Tokenizer and encoder, in float32, dropout off."""
    from transformers import AutoModel, AutoTokenizer

    folder = Path(model).expanduser()
    source = str(folder) if folder.exists() else model
    mend = "give a local folder that holds it as similarity.model, or set similarity.kind=lexical"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        encoder, report = AutoModel.from_pretrained(source, dtype="float32", output_loading_info=True)
    except (OSError, ValueError) as error:
        raise DataError(f"similarity.model: {model} cannot be loaded ({first_line(error)}); {mend}") from error
    # The pooler is not used, and checkpoints for masked language modelling have none.
    if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name):
        raise DataError(f"similarity.model: {model} lacks the weights {missing[:3]}; {mend}")
    return tokenizer, encoder.eval()
