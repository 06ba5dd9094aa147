"""Rejected answers by the policy itself, under restricted sight: Bias-Driven Hallucination Sampling (arXiv 2407.02477).

Read `degrade`, Algorithm 1, first; below it are a guided try, the unguided one, and what they do to a text.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from cluster.settings import Settings
from rl.sight import DIFFUSION_STEPS, Continuation, Sight
from rl.similarity import LexicalSimilarity, Similarity, SimilaritySettings
from rl.types import Prompt


class BdhsSettings(Settings):
    """How answers are degraded; the defaults are the paper's (BDHS with attention mask) where it states them."""

    sight: Literal["drop", "mask"] = "drop"
    """How embeddings are hidden. `drop`: only the visible ones are given to vLLM (fast); `mask`: all keep their
    positions, attention to the hidden ones is masked (transformers)."""
    threshold: float = Field(0.99, ge=0, le=1)
    """Share of each image's embeddings that is hidden, rho_th of the paper. 0.99 suits AnyRes, where 29 of 2,880 tokens
    stay visible; of 576 only 6 would. Retune by the share of answers that need another try."""
    noise: int = Field(0, ge=0, lt=DIFFUSION_STEPS)
    """Diffusion step of the pixels, 0 for none; the paper's variant with noise takes 500 and a threshold of 0."""
    tries: int = Field(5, ge=1)
    """Most tries per answer, N_BDHS of the paper: all guided but the last, which is accepted as it is. 1: a single
    guided one, accepted as it is."""
    similar: float = Field(0.97, ge=0, le=1)
    """Similarity to the true answer from which another try is made, eps_s of the paper; high, so that little more than
    copies is refused."""
    similarity: SimilaritySettings = LexicalSimilarity()
    """How similarity is measured; the paper's is `embedding`."""
    temperature: float = Field(1.0, ge=0, le=2)
    """Of the continuations; the paper states none."""
    max_tokens: int = Field(64, ge=1)
    """Most tokens of a continuation: of the rest of a sentence, and in the unguided try of the whole answer. The paper
    states none."""


Continue = Callable[[Sequence[Continuation]], Awaitable[list[str]]]
"""Gives the continuations' texts, without their prefixes."""


async def degrade(
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    go_on: Continue,
    similarity: Similarity,
    settings: BdhsSettings,
    seed: int,
) -> tuple[list[str], dict[str, int]]:
    """A degraded answer y- for each prompt's true answer y+ (Algorithm 1), all prompts' tries side by side.

    What becomes of a prompt depends on the seed, its id and its answer, not on the others. An answer may come out as it
    was. Counted are `bdhs`, the answers, and `similar_1`, `similar_2`, …: those still similar after that try, the last
    included, though it is accepted anyway.
    """
    degraded = [""] * len(prompts)
    counts = {"bdhs": len(prompts), **{f"similar_{attempt}": 0 for attempt in range(1, settings.tries + 1)}}
    still = list(range(len(prompts)))
    for attempt in range(1, settings.tries + 1):
        if not still:
            break
        drafts = [_begin(prompts[index], answers[index], attempt, settings, seed) for index in still]
        tails = iter(await go_on([request for draft in drafts for request in draft.requests]))
        for index, draft in zip(still, drafts, strict=True):
            degraded[index] = draft.finished(list(islice(tails, len(draft.requests))))
        tried, true = [degraded[index] for index in still], [answers[index] for index in still]
        phi = await asyncio.to_thread(similarity, tried, true)  # an encoder takes its time
        still = [index for index, alike in zip(still, phi, strict=True) if alike >= settings.similar]
        counts[f"similar_{attempt}"] = len(still)
    return degraded, counts


class _Draft(NamedTuple):
    """One try at one answer: what is kept of it, piece by piece, and what the model is asked to add to each."""

    heads: list[str]
    requests: list[Continuation]

    def finished(self, tails: Sequence[str]) -> str:
        """The degraded answer, with the white space the true one begins with."""
        text = "".join(join(head, tail) for head, tail in zip(self.heads, tails, strict=True))
        return _space_before(self.heads[0]) + text.lstrip() if self.heads else ""


def _begin(prompt: Prompt, answer: str, attempt: int, settings: BdhsSettings, seed: int) -> _Draft:
    """The try number `attempt`, with a sight and cuts of its own."""
    key = int.from_bytes(hashlib.sha256(prompt.id.encode()).digest()[:8], "big")
    rng = np.random.default_rng([seed, key, attempt])
    sight = Sight(int(rng.integers(2**32)), settings.threshold, settings.noise)
    if settings.tries > 1 and attempt == settings.tries:
        return _unguided(prompt, answer, sight)
    return _guided(prompt, answer, sight, rng)


def _unguided(prompt: Prompt, answer: str, sight: Sight) -> _Draft:
    """Ask for a full response."""
    return _Draft([_space_before(answer)], [Continuation(prompt, "", sight, to_sentence_end=False)])


def _guided(prompt: Prompt, answer: str, sight: Sight, rng: np.random.Generator) -> _Draft:
    """Ask for the rest of each sentence, after the true sentences before it and its own head."""
    heads, requests = [], []
    before = ""
    for sentence in split_sentences(answer):
        swapped = swap_yes_no(sentence) if rng.random() >= 0.5 else sentence
        head = cut(swapped, rng)
        heads.append(head)
        requests.append(Continuation(prompt, (before + head).rstrip(" \t"), sight, to_sentence_end=True))
        before += sentence
    return _Draft(heads, requests)


_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”\u2019)\]]))(?=\s+\S)")
_YES_NO = re.compile(r"\A(\s*)(yes|Yes|no|No)(?!\w|-\w)")
_OTHER = {"yes": "no", "Yes": "No", "no": "yes", "No": "Yes"}
_CLOSING = frozenset(".,;:!?…%)]}”\u2019")
_OPENING = frozenset("([{“\u2018$€£")


def split_sentences(text: str) -> list[str]:
    """The sentences, each with the white space before it, so that together they are the text again.

    A sentence ends at a full stop, question or exclamation mark, with at most one closing quote or bracket, before
    white space: "3.5" does not end one, "Mr. Smith" does. The paper does not state its splitter.
    """
    return _SENTENCE_END.split(text) if text else []


def swap_yes_no(sentence: str) -> str:
    """The sentence with the yes or no it begins with turned round, its case kept.

    The published pattern has no word boundary and would make "Yest" of "Not"; here "No-one" stays as well.
    """
    return _YES_NO.sub(lambda found: found[1] + _OTHER[found[2]], sentence)


def cut(sentence: str, rng: np.random.Generator) -> str:
    """The sentence up to a random one of its words, which is left out: any number of words stays but all.

    The paper does not state the unit of the position; its printed examples are cut at words.
    """
    starts = [word.start() for word in re.finditer(r"\S+", sentence)]
    return sentence[: starts[rng.integers(len(starts))]] if starts else sentence


def join(head: str, tail: str) -> str:
    """A sentence of its head, as `cut` left it, and its continuation, whose own white space is not to be relied on.

    The white space at the head's end stands where it begins the sentence or breaks the line. Else one space stands
    before words and opening brackets and none before closing punctuation; before other signs the tail's own decides.
    """
    said, begun = tail.strip(), head.rstrip(" \t")
    if not said:
        return head.rstrip()
    if not begun or begun.endswith("\n"):
        return head + said
    gap = _space_before(tail)
    if "\n" not in gap:
        spaced = said[0].isalnum() or said[0] in _OPENING or (gap and said[0] not in _CLOSING)
        gap = " " if spaced else ""
    return begun + gap + said


def _space_before(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]
