"""A reward model as a judge: any Hugging Face checkpoint with a sequence-classification head of one output."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cluster.connect import ActorResources, Role, log_to_file
from cluster.errors import ConfigError, DataError
from cluster.settings import LocalPath
from rl.batching import plan_microbatches
from rl.engine import prepare_worker
from rl.judges.base import Judge, JudgeBase, JudgeContext
from rl.judges.instructions import digest
from rl.policy import Precision, resolve_model, takes_images
from rl.types import Completion, Judgement, Prompt

if TYPE_CHECKING:
    from ray.actor import ActorHandle

CALL_TIMEOUT_S = 1800.0
CHARS_PER_TOKEN, TOKENS_PER_IMAGE = 3, 600
"""Guesses, to bound a pass before anything is tokenised."""


class RewardSettings(JudgeBase):
    """A reward model; one that takes images is shown them."""

    kind: Literal["reward"]
    """Which judge."""
    model: LocalPath
    """Hugging Face name or folder of a sequence-classification checkpoint with one output."""
    precision: Precision = "float32"
    """Of its weights."""
    workers: int = Field(1, ge=1)
    """Copies; they share the answers."""
    resources: ActorResources = ActorResources(cpus=0.25, threads=2)
    """Of one copy."""
    tokens_per_batch: int = Field(8192, ge=1)
    """Padded tokens in one forward pass."""

    @property
    def roles(self) -> list[Role]:
        return [Role("reward model", self.workers, self.resources)]

    def build(self, context: JudgeContext) -> "RewardJudge":
        """The judge; starts its actors."""
        import ray

        model = resolve_model(self.model, "judge.model")
        actor: Any = ray.remote(RewardWorker).options(num_cpus=self.resources.cpus, num_gpus=self.resources.gpus)
        logs = [str(context.logs / f"reward-{index}.log") for index in range(self.workers)]
        return RewardJudge(self.model, [actor.remote(self, model, log) for log in logs])


class RewardWorker:
    """One copy of the reward model. Used as a Ray actor."""

    def __init__(self, settings: RewardSettings, model: str, log: str):
        log_to_file(Path(log))
        prepare_worker(settings.resources.threads)
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer

        config = AutoConfig.from_pretrained(model)
        if getattr(config, "num_labels", 1) != 1:
            raise ConfigError(f"judge.model: {model} has a head of several outputs; a reward model has one")
        self._settings = settings
        self._device = torch.device("cuda" if settings.resources.gpus else "cpu")
        self._takes_images = takes_images(config)
        self._processor = (AutoProcessor if self._takes_images else AutoTokenizer).from_pretrained(model)
        dtype = getattr(torch, settings.precision)
        self._model = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype).to(self._device).eval()
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The head reads the last token that is not padding, which it finds by this id.
        self._model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        tokenizer.padding_side = "right"

    def score(self, conversations: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The reward of each answer to its prompt.

        Raises:
            DataError: a prompt has images and the reward model takes none.
        """
        import torch

        for prompt, _ in conversations:
            if prompt.images and not self._takes_images:
                raise DataError(
                    f"judge.model: prompt {prompt.id} has an image, but the reward model takes none; it would judge "
                    f"without looking"
                )
        texts = [self._render(prompt, answer) for prompt, answer in conversations]
        rewards = [0.0] * len(texts)
        with_images = [index for index, (prompt, _) in enumerate(conversations) if prompt.images]
        without = [index for index, (prompt, _) in enumerate(conversations) if not prompt.images]
        for group in (with_images, without):  # no processor takes both in one batch
            lengths = [
                len(texts[index]) // CHARS_PER_TOKEN + 1 + TOKENS_PER_IMAGE * len(conversations[index][0].images)
                for index in group
            ]
            (passes,) = plan_microbatches(lengths, 1, self._settings.tokens_per_batch)
            for places in passes:
                indices = [group[place] for place in places]
                images = [[image.open() for image in conversations[index][0].images] for index in indices]
                batch = self._processor(
                    text=[texts[index] for index in indices],
                    return_tensors="pt",
                    padding=True,
                    add_special_tokens=False,  # the chat template has written them
                    **({"images": images} if group is with_images else {}),
                )
                with torch.inference_mode():
                    logits = self._model(**batch.to(self._device)).logits.float()
                for index, reward in zip(indices, logits[:, 0].tolist(), strict=True):
                    rewards[index] = reward
        return rewards

    def _render(self, prompt: Prompt, answer: str) -> str:
        messages = [*prompt.messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        if not self._takes_images:  # templates of text models want plain contents
            messages = [
                {"role": one["role"], "content": " ".join(part["text"] for part in one["content"])} for one in messages
            ]
        return str(self._processor.apply_chat_template(messages, tokenize=False))


class RewardJudge(Judge):
    """Shares the answers among the copies."""

    def __init__(self, model: str, workers: Sequence["ActorHandle"]):
        super().__init__()
        self.name = f"reward:{model}"
        self._workers = list(workers)

    async def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[Judgement]]:
        """See `Judge.grade`."""
        flat = [(prompt, one.text) for prompt, group in zip(prompts, completions, strict=True) for one in group]
        shares = [flat[index :: len(self._workers)] for index in range(len(self._workers))]
        calls = [worker.score.remote(share) for worker, share in zip(self._workers, shares, strict=True)]
        answers = await asyncio.wait_for(asyncio.gather(*calls), CALL_TIMEOUT_S)
        rewards = [0.0] * len(flat)
        for index, share in enumerate(answers):
            rewards[index :: len(self._workers)] = share
        self.tally["calls"] += len(flat)
        each = iter(rewards)
        hash = digest(self.name)[:12]
        return [
            [Judgement(reward := next(each), None, f"reward {reward:.4f}", self.name, hash) for _ in group]
            for group in completions
        ]
