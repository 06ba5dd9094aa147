"""Rollout workers: Ray actors that sample completions from the current policy with vLLM."""

import asyncio
import hashlib
import itertools
import os
import tempfile
from collections.abc import Awaitable, Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from cluster.connect import ActorResources, cpu_engine_variables, log_to_file
from cluster.errors import WeightSyncError
from cluster.settings import Settings
from rl.adapters import ENGINE_RANKS
from rl.embeddings import accept_any_length, embed_views
from rl.policy import PolicySettings
from rl.render import answer_token_ids, prompt_token_ids
from rl.sight import Continuation, Sight, views
from rl.types import Completion, Prompt
from rl.weights import TransferBackend

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

CALL_TIMEOUT_S = 1800.0

T = TypeVar("T")


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
        self,
        settings: RolloutSettings,
        policy: PolicySettings,
        model: str,
        backend: TransferBackend,
        log: str,
        blind: bool = False,
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
        if policy.lora and (published := policy.lora.published_rank) is not None:
            adapters = {
                "enable_lora": True,
                "max_lora_rank": next(rank for rank in ENGINE_RANKS if rank >= published),
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
            enable_mm_embeds=blind and self._takes_images,
            weight_transfer_config=transfer_config(backend),
            disable_log_stats=True,
            seed=0,
            **adapters,
        )
        self._banned = placeholder_tokens(self._engine.llm_engine.model_config.hf_config)
        if blind and self._takes_images:
            self._engine.apply_model(accept_any_length)

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
                seed=request_seed(seed, prompt.id) if sampling.temperature > 0 else None,
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

    def go_on(self, requests: Sequence[Continuation], sampling: SamplingSettings, seed: int) -> list[str]:
        """Write each answer on from its prefix, one continuation each, with hidden image embeddings left out.

        What follows an embedding that is left out moves up to its place; an image that is hidden altogether leaves
        no trace. Needs an engine started with `blind`. The texts come without the prefix and without outer space.
        """
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=request_seed(seed, request.id) if sampling.temperature > 0 else None,
                stop=["."] if request.to_sentence_end else None,
                include_stop_str_in_output=True,
                logit_bias=dict.fromkeys(self._banned, -100.0) or None,
            )
            for request in requests
        ]
        inputs = self._sighted_requests(
            [
                (request.prompt, request.sight, answer_token_ids(request.prefix.rstrip(), self._processor))
                for request in requests
            ]
        )
        outputs = self._engine.generate(inputs, parameters, use_tqdm=False, lora_request=self._adapter)
        return [output.outputs[0].text.strip() for output in outputs]

    def distort(
        self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]], noise: int, seed: int
    ) -> list[tuple[int, ...]]:
        """At each place of an answer, the token the engine likes best there when it sees only a noised image.

        Teacher forcing as in POVID (arXiv 2402.11411). Where that token would be an image placeholder or another
        special token, save the end of the turn, the answer keeps its own; so does its last place. The answers are
        completion tokens with their end-of-turn token. Needs an engine started with `blind`.
        """
        from vllm import SamplingParams

        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        refused = {*tokenizer.all_special_ids, *self._banned} - {tokenizer.eos_token_id}
        inputs = self._sighted_requests(
            [
                (prompt, Sight(request_seed(seed, prompt.id), threshold=0, noise=noise), answer)
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
        )
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=1)
        outputs = self._engine.generate(inputs, parameters, use_tqdm=False, lora_request=self._adapter)
        return [
            _likeliest(answer, output.prompt_logprobs[-len(answer) :], refused)
            for answer, output in zip(answers, outputs, strict=True)
        ]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._engine.collective_rpc("init_weight_transfer_engine", args=(init_info,))

    def start_weight_update(self) -> None:
        self._engine.collective_rpc("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._engine.collective_rpc("update_weights", args=(update_info,))

    def finish_weight_update(self) -> None:
        self._engine.collective_rpc("finish_weight_update")
        self._reset_caches()

    def load_adapter(self, weights: bytes, config: str) -> None:
        """Take a PEFT adapter (safetensors bytes and its config as JSON) in place of the one before.

        Only this call reloads it: a request that asked for `load_inplace` would, at every step of the engine.
        """
        from vllm.lora.request import LoRARequest

        folder = Path(self._adapter_folder.name)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "adapter_config.json").write_text(config)
        self._engine.llm_engine.add_lora(LoRARequest("policy", 1, str(folder), load_inplace=True))
        self._adapter = LoRARequest("policy", 1, str(folder))
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

    def _sighted_requests(self, sequences: Sequence[tuple[Prompt, Sight, Sequence[int]]]) -> list[dict[str, Any]]:
        """Prompts, each with the beginning of its answer, that show the engine what the sight beside them lets through.

        vLLM keys its caches by the content of embeddings, so two sights of one image do not meet there.
        """
        wanted = dict.fromkeys(view for prompt, sight, _ in sequences for view in views(prompt, sight))
        embeddings = embed_views(self._engine, list(wanted), self._processor)
        requests = []
        for prompt, sight, beginning in sequences:
            shown = [
                embeddings[view][sight.visible(len(embeddings[view]), index)]
                for index, view in enumerate(views(prompt, sight))
            ]
            placeholder_stays = iter([len(part) > 0 for part in shown])
            ids = prompt_token_ids(prompt, self._processor, expand_images=False)
            ids = tuple(token for token in ids if token not in self._banned or next(placeholder_stays))
            request: dict[str, Any] = {"prompt_token_ids": [*ids, *beginning]}
            if any(map(len, shown)):
                request["multi_modal_data"] = {"image": [part for part in shown if len(part)]}
            requests.append(request)
        return requests


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
        return await share_out(
            self.workers, prompts, lambda worker, share: worker.generate.remote(share, sampling, seed, self.version)
        )

    async def distort(
        self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]], noise: int, seed: int
    ) -> list[tuple[int, ...]]:
        """The likeliest token at each place of each answer under a noised image; see `RolloutWorker.distort`."""
        return await share_out(
            self.workers,
            list(zip(prompts, answers, strict=True)),
            lambda worker, share: worker.distort.remote(*zip(*share, strict=True), noise, seed),
        )


class Blind:
    """Workers that write under restricted sight: rollout workers started with `blind`, or masked workers."""

    def __init__(self, workers: Sequence["ActorHandle"]):
        self.workers = list(workers)

    async def load(self, weights: "Sequence[ObjectRef[Any]]") -> None:
        """Give masked workers new weights, in chunks by in-memory names."""
        for chunk in weights:
            calls = [worker.load.remote(chunk) for worker in self.workers]
            await asyncio.wait_for(asyncio.gather(*calls), CALL_TIMEOUT_S)

    async def go_on(self, requests: Sequence[Continuation], sampling: SamplingSettings, seed: int) -> list[str]:
        """The continuation of each request, in the order of `requests`."""
        return await share_out(self.workers, requests, lambda worker, share: worker.go_on.remote(share, sampling, seed))


def start_rollouts(
    settings: RolloutSettings,
    policy: PolicySettings,
    model: str,
    backend: TransferBackend,
    logs: Path,
    blind: bool = False,
) -> list["ActorHandle"]:
    """Start the engines; `logs` is a local folder. With `blind` they can also write under restricted sight."""
    import ray

    actor: Any = ray.remote(RolloutWorker).options(num_cpus=settings.resources.cpus, num_gpus=settings.resources.gpus)
    return [
        actor.remote(settings, policy, model, backend, str(logs / f"rollout-{index}.log"), blind)
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


def request_seed(seed: int, request_id: str) -> int:
    """A seed of one request's own, so that its answer does not depend on what it is batched with."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{request_id}".encode()).digest()[:4], "big")


def _likeliest(answer: Sequence[int], positions: Sequence[Any], refused: Container[int]) -> tuple[int, ...]:
    """The likeliest token at each position, except that `refused` ones and the last leave the answer as it is."""
    best = [max(position, key=lambda token: position[token].logprob) for position in positions]
    kept = [own if token in refused else token for own, token in zip(answer, best, strict=True)]
    return (*kept[:-1], answer[-1])


async def share_out(
    workers: Sequence["ActorHandle"], items: Sequence[T], call: "Callable[[ActorHandle, Sequence[T]], Awaitable[Any]]"
) -> list[Any]:
    """Give every worker its share of the items; the results come back in the items' order."""
    shares = [items[index :: len(workers)] for index in range(len(workers))]
    calls = [call(worker, share) for worker, share in zip(workers, shares, strict=True) if share]
    return _interleave(await asyncio.wait_for(asyncio.gather(*calls), CALL_TIMEOUT_S))


def _interleave(shares: Sequence[Sequence[Any]]) -> list[Any]:
    rows = itertools.zip_longest(*shares, fillvalue=None)
    return [item for row in rows for item in row if item is not None]
