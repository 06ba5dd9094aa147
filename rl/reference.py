"""The reference: a frozen copy of the starting model whose log-probs the loss compares with."""

import asyncio
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cluster.connect import ActorResources, log_to_file
from cluster.settings import LocalPath, Settings
from rl.batching import plan_microbatches
from rl.engine import prepare_worker
from rl.policy import PolicySettings, resolve_model
from rl.rollout import CALL_TIMEOUT_S
from rl.scoring import ScoredSequence, to_sequence
from rl.types import Completion, Pair, PairValues, Prompt

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class ReferenceSettings(Settings):
    """The reference model's actors."""

    model: LocalPath | None = None
    """Model folder or hub id, with the policy's tokenizer; left out, what the policy starts from."""
    workers: int = Field(1, ge=1)
    """Copies of the reference; they share the sequences."""
    resources: ActorResources = ActorResources(cpus=0.25, threads=2)
    """Of one copy."""
    tokens_per_batch: int = Field(8192, ge=1)
    """Padded tokens in one forward pass."""


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

    def score(self, sequences: Sequence[ScoredSequence]) -> list[float]:
        """Summed log-prob of each completion, in nats."""
        import torch

        from rl.scoring import collate, token_logps

        sums = [0.0] * len(sequences)
        (passes,) = plan_microbatches([len(s) for s in sequences], 1, self._settings.tokens_per_batch)
        with torch.inference_mode():
            for indices in passes:
                batch = collate([sequences[i] for i in indices], self._processor, run_vision=False)
                totals = token_logps(self._model, batch, self._device).sum(-1)
                for index, total in zip(indices, totals.tolist(), strict=True):
                    sums[index] = total
        return sums


class Reference:
    """Scores pairs through the reference workers, never the same tokens twice."""

    def __init__(self, workers: Sequence["ActorHandle"], version: str):
        self._workers = list(workers)
        self._version = version
        self._known: dict[str, float] = {}

    def remember(self, pairs: Iterable[Pair]) -> None:
        """Take over scores that the run folder already has for this reference version."""
        for pair in pairs:
            if pair.reference_version == self._version and pair.reference_logps is not None:
                for completion, logp in zip(pair.completions, pair.reference_logps, strict=True):
                    self._known[self._key(to_sequence(pair.prompt, completion))] = logp

    async def score(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs with `reference_logps` filled in."""
        logps = await self.logps([(pair.prompt, one) for pair in pairs for one in pair.completions])
        return [
            dataclasses.replace(pair, reference_logps=PairValues(chosen, rejected), reference_version=self._version)
            for pair, chosen, rejected in zip(pairs, logps[::2], logps[1::2], strict=True)
        ]

    async def logps(self, completions: Sequence[tuple[Prompt, Completion]]) -> list[float]:
        """The summed log-prob of each completion under the reference, in nats."""
        sequences = [to_sequence(prompt, completion) for prompt, completion in completions]
        keys = [self._key(sequence) for sequence in sequences]
        missing = [index for index, key in enumerate(keys) if key not in self._known]
        shares = [missing[index :: len(self._workers)] for index in range(len(self._workers))]
        calls = [
            worker.score.remote([sequences[index] for index in share])
            for worker, share in zip(self._workers, shares, strict=True)
            if share
        ]
        for share, sums in zip(
            filter(None, shares), await asyncio.wait_for(asyncio.gather(*calls), CALL_TIMEOUT_S), strict=True
        ):
            self._known.update((keys[index], logp) for index, logp in zip(share, sums, strict=True))
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
