"""The reference: a frozen copy of the starting model whose log-probs the loss compares with."""

import asyncio
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag

from cluster.connect import ActorResources, log_to_file
from cluster.settings import LocalPath, Settings
from rl.batching import plan_microbatches
from rl.engine import prepare_worker
from rl.extras import sequences
from rl.policy import PolicySettings, resolve_model
from rl.rollout import CALL_TIMEOUT_S, share_out
from rl.scoring import ScoredSequence, to_sequence
from rl.types import Completion, Pair, PairValues, Prompt

if TYPE_CHECKING:
    import torch
    from ray import ObjectRef
    from ray.actor import ActorHandle


ReferenceUpdate = Literal["fixed", "round", "average"]
BASE_OF_ADAPTER: Final = "base-of-adapter"


class ReferenceSettings(Settings):
    """The reference model's actors."""

    model: LocalPath | None = None
    """Model folder or hub id, with the policy's tokenizer; left out, what the policy starts from."""
    update: ReferenceUpdate = "fixed"
    """`fixed`; `round`: the policy at the end of each round becomes the reference of the next (pairs.kind iterative);
    `average`: every `every` steps it moves by `share` towards the policy (TR-DPO, arXiv 2404.09656)."""
    every: int = Field(512, ge=1)
    """Steps between two moves of `average`."""
    share: float = Field(0.6, gt=0, le=1)
    """How far `average` moves; 1 makes the policy the reference."""
    workers: int = Field(1, ge=1)
    """Copies of the reference; they share the sequences."""
    resources: ActorResources = ActorResources(cpus=0.25, threads=2)
    """Of one copy."""
    tokens_per_batch: int = Field(8192, ge=1)
    """Padded tokens in one forward pass."""


ReferenceChoice = Annotated[
    Annotated[ReferenceSettings, Tag("workers")] | Annotated[Literal["base-of-adapter"], Tag("learner")],
    Discriminator(lambda choice: "learner" if isinstance(choice, str) else "workers"),
]


class ReferenceWorker:
    """One frozen copy of the model. Used as a Ray actor."""

    def __init__(self, settings: ReferenceSettings, policy: PolicySettings, model: str, log: str):
        log_to_file(Path(log))
        prepare_worker(settings.resources.threads)
        import torch

        from rl.policy import load_model, load_processor

        self._settings = settings
        self._device = torch.device("cuda" if settings.resources.gpus else "cpu")
        self._processor = load_processor(model)
        self._model = load_model(model, policy.precision).to(self._device).requires_grad_(False)

    def score(self, sequences: Sequence[ScoredSequence]) -> list[tuple[float, ...]]:
        """The log-prob of each token of each completion, in nats."""
        import torch

        from rl.scoring import collate, token_logps

        scores: list[tuple[float, ...]] = [()] * len(sequences)
        (passes,) = plan_microbatches([len(s) for s in sequences], 1, self._settings.tokens_per_batch)
        with torch.inference_mode():
            for indices in passes:
                batch = collate([sequences[i] for i in indices], self._processor, run_vision=False)
                logps = token_logps(self._model, batch, self._device).tolist()
                for index, row in zip(indices, logps, strict=True):
                    scores[index] = tuple(row[sequences[index].span])
        return scores

    def renew(self, weights: Mapping[str, "torch.Tensor"], share: float) -> None:
        """Move the weights by `share` of the way to those of the policy, given by their in-memory names."""
        import torch

        own = dict(self._model.named_parameters())  # a tied weight is there once, and moves once
        with torch.no_grad():
            for name in own.keys() & weights.keys():
                own[name].lerp_(weights[name].to(own[name]), share)

    def weights(self) -> dict[str, "torch.Tensor"]:
        """All weights by their in-memory names, on the CPU."""
        return {name: parameter.detach().cpu() for name, parameter in self._model.named_parameters()}


class Reference:
    """Scores pairs through the reference workers, never the same tokens twice."""

    def __init__(self, workers: Sequence["ActorHandle"], version: str):
        self._workers = list(workers)
        self.base = version
        """What the workers were started with."""
        self._version = version
        self._known: dict[str, tuple[float, ...]] = {}
        self._resting = asyncio.Lock()

    @property
    def version(self) -> str:
        """Which weights the workers hold."""
        return self._version

    def remember(self, pairs: Iterable[Pair]) -> None:
        """Take over scores that the run folder already has for this reference version."""
        for pair in pairs:
            if pair.reference_version == self._version and pair.reference_logps is not None:
                known = [*pair.reference_logps, *(extra.reference_logps for extra in pair.extras)]
                for sequence, logps in zip(sequences(pair), known, strict=True):
                    if logps is not None:
                        self._known[self._key(sequence)] = logps

    async def score(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs with `reference_logps` filled in, their own and those of their extras."""
        async with self._resting:
            scores = iter(await self._score([sequence for pair in pairs for sequence in sequences(pair)]))
        return [
            replace(
                pair,
                reference_logps=PairValues(next(scores), next(scores)),
                reference_version=self._version,
                extras=tuple(extra._replace(reference_logps=next(scores)) for extra in pair.extras),
            )
            for pair in pairs
        ]

    async def logps(self, completions: Sequence[tuple[Prompt, Completion]]) -> list[float]:
        """The summed log-prob of each completion under the reference, in nats."""
        async with self._resting:
            return list(map(sum, await self._score([to_sequence(prompt, one) for prompt, one in completions])))

    async def renew(self, version: str, weights: Sequence["ObjectRef[Any]"], share: float) -> None:
        """Move every worker by `share` of the way to the policy's weights, given in chunks; none scores meanwhile."""
        async with self._resting:
            for chunk in weights:
                calls = [worker.renew.remote(chunk, share) for worker in self._workers]
                await asyncio.wait_for(asyncio.gather(*calls), CALL_TIMEOUT_S)
            self._version = version
            self._known.clear()

    def weights(self) -> "ObjectRef[Any]":
        """What the workers hold, for a checkpoint: a dictionary in the object store."""
        reference: ObjectRef[Any] = self._workers[0].weights.remote()
        return reference

    async def _score(self, sequences: Sequence[ScoredSequence]) -> list[tuple[float, ...]]:
        keys = [self._key(sequence) for sequence in sequences]
        missing = [index for index, key in enumerate(keys) if key not in self._known]
        scores = await share_out(
            self._workers, [sequences[index] for index in missing], lambda worker, share: worker.score.remote(share)
        )
        self._known.update((keys[index], logps) for index, logps in zip(missing, scores, strict=True))
        return [self._known[key] for key in keys]

    def _key(self, sequence: ScoredSequence) -> str:
        digests = [image.digest for image in sequence.images]
        content = repr((self._version, sequence.prompt_token_ids, sequence.token_ids, digests))
        return hashlib.sha256(content.encode()).hexdigest()


def start_reference(settings: ReferenceSettings, policy: PolicySettings, model: str, logs: Path) -> Reference:
    """Start the reference's actors; `model` is what the policy starts from, `logs` a local folder.

    Raises:
        DataError: there is no model at `reference.model`.
    """
    import ray

    if settings.model is not None:
        model = resolve_model(settings.model, "reference.model")
    actor: Any = ray.remote(ReferenceWorker).options(num_cpus=settings.resources.cpus, num_gpus=settings.resources.gpus)
    workers = [
        actor.remote(settings, policy, model, str(logs / f"reference-{index}.log")) for index in range(settings.workers)
    ]
    return Reference(workers, model_version(model))


def model_version(model: str) -> str:
    """A short digest of a model: of a folder's config and of the size and both ends of each weight file."""
    digest = hashlib.sha256(model.encode() if not Path(model).is_dir() else b"")
    for path in sorted(Path(model).glob("*")) if Path(model).is_dir() else []:
        if path.suffix in (".safetensors", ".json"):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read())
    return digest.hexdigest()[:16]
