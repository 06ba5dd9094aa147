"""Rollout workers: Ray actors that sample completions from the current policy with vLLM."""

import asyncio
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cluster.connect import ActorResources, cpu_engine_variables, log_to_file
from cluster.errors import WeightSyncError
from cluster.settings import Settings
from rl.policy import PolicySettings
from rl.render import prompt_token_ids
from rl.types import Completion, Prompt
from rl.weights import TransferBackend

if TYPE_CHECKING:
    from ray.actor import ActorHandle

CALL_TIMEOUT_S = 1800.0


class SamplingSettings(Settings):
    """How completions are drawn."""

    completions: int = Field(4, ge=1)
    """Completions of each prompt."""
    temperature: float = Field(1.0, ge=0, le=2)
    """1 samples from the policy itself; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1 keeps the whole distribution."""
    max_tokens: int = Field(64, ge=1)
    """Longest completion."""


class RolloutSettings(Settings):
    """The sampling engines."""

    workers: int = Field(1, ge=1)
    """vLLM engines, one Ray actor each; they share the prompts."""
    resources: ActorResources = ActorResources(cpus=0.5, threads=2)
    """Of one engine; `gpus` is its tensor-parallel size."""
    sampling: SamplingSettings = SamplingSettings()
    """How completions are drawn for training."""
    max_sequences: int = Field(256, ge=1)
    """Sequences one engine decodes at the same time."""
    cpu_cache_gib: int = Field(1, ge=1)
    """GiB of key-value cache of an engine on a CPU."""
    gpu_memory_fraction: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory one engine takes."""
    max_images: int = Field(1, ge=1)
    """Most images in one prompt."""


class RolloutWorker:
    """One vLLM engine, inside the actor's own process. Used as a Ray actor."""

    def __init__(
        self, settings: RolloutSettings, policy: PolicySettings, model: str, backend: TransferBackend, log: str
    ):
        log_to_file(Path(log))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        on_cpu = settings.resources.gpus == 0
        if on_cpu:
            os.environ.update(cpu_engine_variables(settings.resources.threads, settings.cpu_cache_gib))
        from transformers import AutoProcessor
        from vllm import LLM

        from rl.transfer import transfer_config

        self._processor = AutoProcessor.from_pretrained(model)
        self._adapter: Any = None
        self._adapter_folder = tempfile.TemporaryDirectory(prefix="raylign-adapter-")
        adapters: dict[str, Any] = {}
        if policy.lora:
            adapters = {
                "enable_lora": True,
                "max_lora_rank": max(8, policy.lora.rank),
                "max_loras": 1,
                # Left open, vLLM wraps the language head too, and then cannot give prompt log-probs on a CPU.
                "lora_target_modules": list(policy.lora.target_modules),
            }
        ranks = max(1, int(settings.resources.gpus))
        self._engine = LLM(
            model=model,
            dtype=policy.precision,
            max_model_len=policy.max_length,
            max_num_seqs=settings.max_sequences,
            tensor_parallel_size=ranks,
            distributed_executor_backend="uni" if ranks == 1 else "mp",
            gpu_memory_utilization=settings.gpu_memory_fraction,
            enforce_eager=on_cpu,
            # vLLM rewinds the generator of a seeded request whose prompt was cut; a CPU generator cannot.
            enable_chunked_prefill=not on_cpu,
            limit_mm_per_prompt={"image": settings.max_images} if self._takes_images else None,
            weight_transfer_config=transfer_config(backend),
            disable_log_stats=True,
            seed=0,
            **adapters,
        )
        self._banned = placeholder_tokens(self._engine.llm_engine.model_config.hf_config)

    @property
    def _takes_images(self) -> bool:
        return hasattr(self._processor, "image_processor")

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, seed: int, version: int
    ) -> list[list[Completion]]:
        """Sample `sampling.completions` answers to each prompt.

        A prompt's seed comes from `seed` and its id, so the answers do not depend on which worker it went to.
        Log-probs are vLLM's raw ones, before temperature and truncation. Image placeholders are never sampled:
        a trainer could not tell them from places where an image belongs.
        """
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                n=sampling.completions,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=_seed(seed, prompt.id) if sampling.temperature > 0 else None,
                logprobs=0,
                logit_bias=dict.fromkeys(self._banned, -100.0) or None,
            )
            for prompt in prompts
        ]
        requests = [self._request(prompt) for prompt in prompts]
        outputs = self._engine.generate(requests, parameters, use_tqdm=False, lora_request=self._adapter)
        return [
            [_completion(prompt, output.prompt_token_ids, sample, version) for sample in output.outputs]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def score(self, sequences: Sequence[tuple[Prompt, tuple[int, ...]]]) -> list[list[float]]:
        """The engine's log-probs of given completion tokens, each token in nats."""
        from vllm import SamplingParams

        requests = []
        for prompt, token_ids in sequences:
            request = self._request(prompt)
            request["prompt_token_ids"] = [*request["prompt_token_ids"], *token_ids]
            requests.append(request)
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0)
        outputs = self._engine.generate(requests, parameters, use_tqdm=False, lora_request=self._adapter)
        scores = []
        for (_, token_ids), output in zip(sequences, outputs, strict=True):
            positions = output.prompt_logprobs[-len(token_ids) :]
            scores.append([position[token].logprob for token, position in zip(token_ids, positions, strict=True)])
        return scores

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._engine.collective_rpc("init_weight_transfer_engine", args=(init_info,))

    def start_weight_update(self) -> None:
        self._engine.collective_rpc("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._engine.collective_rpc("update_weights", args=(update_info,))

    def finish_weight_update(self) -> None:
        self._engine.collective_rpc("finish_weight_update")
        self._reset_caches()

    def load_adapter(self, version: int, weights: bytes, config: str) -> None:
        """Take a PEFT adapter (safetensors bytes and its config as JSON) in place of the one before."""
        from vllm.lora.request import LoRARequest

        folder = Path(self._adapter_folder.name) / str(version)
        folder.mkdir(exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "adapter_config.json").write_text(config)
        if self._adapter is not None:
            self._engine.llm_engine.remove_lora(self._adapter.lora_int_id)
            shutil.rmtree(self._adapter.lora_path, ignore_errors=True)
        self._adapter = LoRARequest(f"policy-{version}", version + 1, str(folder))
        self._reset_caches()

    def _reset_caches(self) -> None:
        """All three caches hold what the old weights computed.

        Raises:
            WeightSyncError: the prefix cache is in use and could not be emptied.
        """
        if not self._engine.reset_prefix_cache():
            raise WeightSyncError(
                "the prefix cache could not be reset after a weight update: requests are still running"
            )
        self._engine.llm_engine.reset_encoder_cache()
        self._engine.llm_engine.reset_mm_cache()

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        request: dict[str, Any] = {
            "prompt_token_ids": list(prompt_token_ids(prompt, self._processor, expand_images=False))
        }
        if prompt.images:
            request["multi_modal_data"] = {"image": [image.open() for image in prompt.images]}
        return request


class Rollouts:
    """All rollout workers; prompts are shared out and answers come back in the prompts' order."""

    def __init__(self, workers: Sequence["ActorHandle"]):
        self.workers = list(workers)
        self.version = 0
        """Policy version the engines hold; stamped on every completion."""

    async def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, seed: int
    ) -> list[list[Completion]]:
        """Completions of each prompt, in the order of `prompts`."""
        shares = [prompts[index :: len(self.workers)] for index in range(len(self.workers))]
        calls = [
            worker.generate.remote(share, sampling, seed, self.version)
            for worker, share in zip(self.workers, shares, strict=True)
            if share
        ]
        answered = await asyncio.wait_for(asyncio.gather(*calls), CALL_TIMEOUT_S)
        return _interleave(answered)


def start_rollouts(
    settings: RolloutSettings, policy: PolicySettings, model: str, backend: TransferBackend, logs: Path
) -> list["ActorHandle"]:
    """Start the engines; `logs` is a local folder."""
    import ray

    actor: Any = ray.remote(RolloutWorker).options(num_cpus=settings.resources.cpus, num_gpus=settings.resources.gpus)
    return [
        actor.remote(settings, policy, model, backend, str(logs / f"rollout-{index}.log"))
        for index in range(settings.workers)
    ]


def placeholder_tokens(hf_config: Any) -> list[int]:
    """Ids of the tokens that stand for images and videos in a prompt."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = {getattr(hf_config, name, None) for name in names}
    return sorted(token for token in ids if isinstance(token, int))


def _completion(prompt: Prompt, prompt_ids: Iterable[int], sample: Any, version: int) -> Completion:
    return Completion(
        prompt_id=prompt.id,
        prompt_token_ids=tuple(prompt_ids),
        token_ids=tuple(sample.token_ids),
        text=sample.text.strip(),
        logps=tuple(entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs, strict=True)),
        policy_version=version,
        finish_reason=sample.finish_reason,
    )


def _seed(seed: int, prompt_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()[:4], "big")


def _interleave(shares: Sequence[Sequence[Any]]) -> list[Any]:
    rows = itertools.zip_longest(*shares, fillvalue=None)
    return [item for row in rows for item in row if item is not None]
