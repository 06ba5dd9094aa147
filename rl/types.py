"""What travels round the loop: prompts, completions, judgements, pairs."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

from rl.images import CanonicalImage

Message = dict[str, Any]
"""An OpenAI chat message whose content is a list of {"type": "text", "text": …} and {"type": "image"} parts."""

T = TypeVar("T")
WRITTEN = "written"
"""`finish_reason` of a completion that nobody sampled, such as a reference answer."""
Source = Literal["online", "offline", "bdhs", "povid", "constructed"]
MADE_BY_POLICY: tuple[Source, ...] = ("online", "bdhs", "povid")
"""Sources whose pairs age as the policy learns."""
ExtraRole = Literal["corrupted", "mismatched", "sample", "judged"]
"""What a further sequence beside a pair is: the chosen completion under a corrupted image (mDPO), another pair's chosen
completion behind this prompt (KTO), a further sample of the policy (D2O), the rejected completion behind prompt and
judgement (CUT)."""


@dataclass(frozen=True)
class Prompt:
    """What the policy is asked. `images` fill the image parts of `messages` in order."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[CanonicalImage, ...] = ()
    reference_answer: str | None = None
    truth: dict[str, Any] | None = None
    source: str = ""
    """Which data set it comes from."""

    @classmethod
    def make(
        cls,
        messages: Sequence[Message],
        images: Sequence[CanonicalImage] = (),
        reference_answer: str | None = None,
        truth: dict[str, Any] | None = None,
        id: str | None = None,
        source: str = "",
    ) -> Self:
        """A prompt whose id, unless given, is a hash of its messages and image digests."""
        content = json.dumps([list(messages), [image.digest for image in images]], sort_keys=True)
        id = id or hashlib.sha256(content.encode()).hexdigest()[:16]
        return cls(id, tuple(messages), tuple(images), reference_answer, truth, source)

    @property
    def text(self) -> str:
        """All text of the last user message."""
        return " ".join(part["text"] for part in self.messages[-1]["content"] if part["type"] == "text")


@dataclass(frozen=True)
class Completion:
    """One sampled answer, with the tokens exactly as the engine sampled them."""

    prompt_id: str
    prompt_token_ids: tuple[int, ...]
    """As the engine saw them, image placeholders expanded."""
    token_ids: tuple[int, ...]
    text: str
    logps: tuple[float, ...]
    """The sampler's own raw log-prob of each token, in nats."""
    policy_version: int
    finish_reason: str


class Attributes(NamedTuple):
    """HelpSteer's five attributes, each from 0 to 4."""

    helpfulness: int
    correctness: int
    coherence: int
    complexity: int
    verbosity: int


@dataclass(frozen=True)
class Judgement:
    """A judge's verdict on one completion of a prompt."""

    score: float | None
    """Higher is better, comparable only within the prompt's completions; None if the judge abstained.

    A graded judge gives `graded_score(attributes)`; a pairwise judge the number of the other answers that this
    one beats, a tie counting half.
    """
    attributes: Attributes | None
    reason: str
    judge: str
    prompt_hash: str
    """Of the instructions the judge worked from, so that verdicts of changed instructions are not mixed."""


def graded_score(attributes: Attributes) -> float:
    """Helpfulness + correctness + coherence, 0 to 12 (arXiv 2402.10884)."""
    return float(attributes.helpfulness + attributes.correctness + attributes.coherence)


class PairValues(NamedTuple, Generic[T]):
    """Something that a pair has for its chosen and for its rejected completion."""

    chosen: T
    rejected: T


class Extra(NamedTuple):
    """A further sequence that some losses score beside a pair; its completion has prompt tokens of its own."""

    role: ExtraRole
    completion: Completion
    reference_logps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, the first preferred."""

    prompt: Prompt
    completions: PairValues[Completion]
    judgements: PairValues[Judgement]
    margin: float
    source: Source
    policy_version: int
    reference_logps: PairValues[tuple[float, ...]] | None = None
    """Log-prob of each token under the reference, in nats; None until the reference has scored the pair."""
    reference_version: str = ""
    label_noise: float = 0.0
    """Assumed probability that the order is wrong."""
    weight: float = 1.0
    """What the pair counts in the loss of its step, relative to the others."""
    extras: tuple[Extra, ...] = ()


@dataclass(frozen=True)
class PairBatch:
    """The pairs of one optimizer step, and what became of the other prompts."""

    step: int
    pairs: tuple[Pair, ...]
    position: int
    """How many prompts, or stored pairs, the run has consumed with this batch; resume goes on from here."""
    counts: dict[str, int] = field(default_factory=dict)
    """prompts, completions and tokens sampled, and the outcomes of `make_pairs`."""
    seconds: dict[str, float] = field(default_factory=dict)
    judging: dict[str, float] = field(default_factory=dict)
    """The judge's tally and cost up to and with this batch."""
