"""Publishing: new weights to every sampling engine, then proof that each holds them.

Full weights travel over vLLM's weight-transfer interface, through its NCCL engine or through Ray's object store.
Adapters are small: they go as one object, and the engine loads them in place of those before.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cluster.connect import free_port
from cluster.errors import WeightSyncError
from cluster.settings import Settings
from rl.adapters import ADAPTER, LoraSettings, adapted_layers, is_adapted, merged, plain_lora, plain_names
from rl.engine import TrainEngine, gathered
from rl.policy import check_public_names, plain_model, public_names, save_checkpoint
from rl.scoring import ScoredSequence, collate, token_logps
from rl.types import Prompt

if TYPE_CHECKING:
    import torch
    from ray.actor import ActorHandle
    from transformers import ProcessorMixin
    from vllm.distributed.weight_transfer.base import ParamMeta

TransferBackend = Literal["object_store", "nccl"]
RPC_TIMEOUT_S = 600.0
CHUNK_BYTES = 256 << 20


class WeightSettings(Settings):
    """How new weights reach the sampling engines."""

    transfer: TransferBackend = "object_store"
    """`object_store` works everywhere; `nccl` is for rollout engines on GPUs."""
    tolerance: float = Field(1e-4, gt=0)
    """Largest difference, in nats per token, between trainer and engine on the probe batch before the run stops.
    float32 agrees to 1e-4; for bfloat16 allow 0.1."""
    probes: int = Field(8, ge=1)
    """Prompts of the probe batch."""


@dataclass(frozen=True)
class Probe:
    """A fixed prompt and completion that trainer and engines both score after each publication."""

    prompt: Prompt
    sequence: ScoredSequence


class Publisher:
    """Sends the policy to the engines. Made and called on every trainer rank together; rank 0 talks to the engines."""

    def __init__(
        self,
        settings: WeightSettings,
        lora: LoraSettings | None,
        model: "torch.nn.Module",
        checkpoint_names: Sequence[str],
        processor: "ProcessorMixin",
        workers: Sequence["ActorHandle"],
        ranks_per_worker: int,
        rank: int,
    ):
        """`model` must not be sharded yet; its names and shapes are checked against `checkpoint_names`.

        Raises:
            DataError: a weight has no partner in the checkpoint the engines loaded, or the other way round.
        """
        self._settings = settings
        self._workers = list(workers)
        self._rank = rank
        self._processor = processor
        client = RolloutClient(self._workers, ranks_per_worker)
        self._sender = make_sender(settings.transfer, lora, model, checkpoint_names, client, rank)

    def connect(self, engine: TrainEngine) -> None:
        """Take the trainer's engine, which exists only after the model's names and shapes were read."""
        self._engine = engine

    def publish(self, version: int, probes: Sequence[Probe]) -> float:
        """Send the current weights as policy `version` and probe every engine.

        Returns the largest difference per token in nats, on rank 0 (0 elsewhere).

        Raises:
            WeightSyncError: an engine's log-probs differ from the trainer's by more than the tolerance.
        """
        self._sender.send(self._engine)
        expected = self._score(probes)
        if self._rank != 0:
            return 0.0
        return prove(version, self._workers, probes, expected, self._settings.tolerance)

    def _score(self, probes: Sequence[Probe]) -> list[list[float]]:
        """The trainer's log-probs of the probes; every rank runs it, as ZeRO wants."""
        import torch

        sequences = [probe.sequence for probe in probes]
        self._engine.module.eval()
        with torch.no_grad():
            batch = collate(sequences, self._processor, run_vision=hasattr(self._processor, "image_processor"))
            logps = token_logps(self._engine.module, batch, self._engine.device)
        self._engine.module.train()
        return [row[s.span].tolist() for row, s in zip(logps, sequences, strict=True)]


def prove(
    version: int,
    workers: Sequence["ActorHandle"],
    probes: Sequence[Probe],
    expected: Sequence[Sequence[float]],
    tolerance: float,
) -> float:
    """Have every engine score the probes; returns the largest difference from `expected` in nats per token.

    Raises:
        WeightSyncError: a difference is above the tolerance, or not a number.
    """
    import ray

    request = [(probe.prompt, probe.sequence.token_ids) for probe in probes]
    answers = ray.get([worker.score.remote(request) for worker in workers], timeout=RPC_TIMEOUT_S)
    differences = [max_difference(expected, scores) for scores in answers]
    for index, difference in enumerate(differences):
        if not difference <= tolerance:  # a NaN must stop the run too
            raise WeightSyncError(
                f"after publishing policy version {version}, rollout worker {index} scores the probe batch "
                f"{difference:.2g} nats per token away from the trainer (weights.tolerance is {tolerance:g}): "
                f"its weights are not the trainer's, so the run stops"
            )
    return max(differences)


def max_difference(expected: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]) -> float:
    """The largest absolute difference over all tokens; NaN if there is any NaN."""
    import numpy as np

    flat = [np.concatenate([np.asarray(row, dtype=np.float64) for row in rows]) for rows in (expected, scores)]
    return float(np.max(np.abs(flat[0] - flat[1])))


class Sender:
    """The way of a policy from all trainer ranks to the engines; rank 0 holds the other end."""

    def __init__(self, model: "torch.nn.Module", client: "RolloutClient", rank: int):
        """`model` is not sharded yet."""
        self._model, self._client, self._rank = model, client, rank

    def send(self, engine: TrainEngine) -> None:
        """One update round; every rank gathers, rank 0 sends."""
        raise NotImplementedError


class AdapterSender(Sender):
    """The adapter alone, as a plain LoRA."""

    def send(self, engine: TrainEngine) -> None:
        """One update round; every rank gathers, rank 0 sends."""
        from safetensors.torch import save

        tensors, config = adapter_state(self._model, engine)
        if self._rank == 0:
            self._client.load_adapter(save(tensors), config)


class WeightSender(Sender):
    """All weights under their public names."""

    def __init__(self, model: "torch.nn.Module", client: "RolloutClient", rank: int):
        super().__init__(model, client, rank)
        self._names = public_names(model)
        weights = model.state_dict()
        self._shapes = {
            name: (weights[now].dtype, tuple(weights[now].shape)) for name, now in plain_names(model).items()
        }

    def _weights(self, engine: TrainEngine) -> "Iterator[tuple[str, torch.Tensor]]":
        """(public name, whole tensor) of every weight; a collective of all ranks."""
        for name, tensor in merged_weights(self._model, engine):
            yield self._names[name], tensor


class ObjectStoreSender(WeightSender):
    """Through Ray's object store, in chunks of `CHUNK_BYTES`, into the engines of rl/transfer.py."""

    def send(self, engine: TrainEngine) -> None:
        """One update round; every rank gathers, rank 0 sends."""
        if self._rank == 0:
            self._client.start_weight_update()
        for chunk in weight_chunks(self._weights(engine), keep=self._rank == 0):
            self._client.update_weights({"tensors": chunk})
        if self._rank == 0:
            self._client.finish_weight_update()


class NcclSender(WeightSender):
    """Over vLLM's own NCCL engine; GPUs only."""

    _transfer: Any = None

    def send(self, engine: TrainEngine) -> None:
        """One update round; the first meets the engines."""
        self._engine = engine
        if self._transfer is None:
            self._transfer = self._meet()
        self._transfer.send_weights()

    # The two halves of vLLM's WeightSource protocol, read by its NCCL engine.

    def metadata(self) -> "list[ParamMeta]":
        """What iteration will yield, in the same order."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(self._names[name], *shape) for name, shape in self._shapes.items()]

    def __iter__(self) -> "Iterator[tuple[str, torch.Tensor]]":
        yield from self._weights(self._engine)

    def _meet(self) -> Any:
        import ray
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(
            master_address=ray.util.get_node_ip_address(),
            master_port=free_port(),
            world_size=self._client.ranks + 1,
            rank=self._rank,
        )
        return WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self)


SENDERS: dict[TransferBackend, type[WeightSender]] = {"object_store": ObjectStoreSender, "nccl": NcclSender}


def make_sender(
    transfer: TransferBackend,
    lora: LoraSettings | None,
    model: "torch.nn.Module",
    checkpoint_names: Sequence[str],
    client: "RolloutClient",
    rank: int,
) -> Sender:
    """What is published: an adapter where the engines can take it, else whole weights, DoRA's merged.

    Raises:
        DataError: of whole weights, one has no partner in the checkpoint the engines loaded, or the other way round.
    """
    if lora is not None and lora.published_rank is not None:
        return AdapterSender(model, client, rank)
    tied = ["lm_head.weight"] if plain_model(model).config.tie_word_embeddings else []
    check_public_names(public_names(model), checkpoint_names, tied)
    return SENDERS[transfer](model, client, rank)


def weight_chunks(weights: "Iterable[tuple[str, torch.Tensor]]", keep: bool) -> "Iterator[dict[str, torch.Tensor]]":
    """Copies of the weights in pieces of `CHUNK_BYTES`; none where not `keep`, though every weight is asked for."""
    chunk: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        if keep:
            chunk[name] = tensor.detach().cpu().clone()
            size += tensor.nbytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = {}, 0
    if chunk:
        yield chunk


class RolloutClient:
    """The control calls of a weight update, vLLM's and ours, fanned out to every rollout worker, each with a time
    limit."""

    def __init__(self, workers: Sequence["ActorHandle"], ranks_per_worker: int):
        self._workers = workers
        self._ranks_per_worker = ranks_per_worker

    @property
    def ranks(self) -> int:
        """Processes that receive weights, over all engines."""
        return len(self._workers) * self._ranks_per_worker

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each engine takes its own span of ranks in the transfer group."""
        import ray

        calls = []
        for index, worker in enumerate(self._workers):
            offset = init_info["rank_offset"] + index * self._ranks_per_worker
            calls.append(worker.init_weight_transfer_engine.remote({**init_info, "rank_offset": offset}))
        ray.get(calls, timeout=RPC_TIMEOUT_S)

    def start_weight_update(self) -> None:
        """Announce an update."""
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """One chunk of it."""
        import ray

        self._call("update_weights", ray.put(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The last chunk was sent."""
        self._call("finish_weight_update")

    def load_adapter(self, weights: bytes, config: str) -> None:
        """A whole adapter: safetensors bytes, and its config as JSON."""
        import ray

        self._call("load_adapter", ray.put(weights), config)

    def _call(self, method: str, *arguments: Any) -> None:
        import ray

        ray.get([getattr(worker, method).remote(*arguments) for worker in self._workers], timeout=RPC_TIMEOUT_S)


def merged_weights(model: "torch.nn.Module", engine: TrainEngine) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield (in-memory name, whole tensor) of every weight of the model, with its adapters merged into them.

    A collective of all ranks; a tensor is valid only until the next one is asked for.
    """
    layers = {f"{name}.base_layer.weight": layer for name, layer in adapted_layers(model).items()}
    names = plain_names(model)
    plain = {now: name for name, now in names.items()}
    for now, tensor in engine.full_weights(names.values()):
        if (layer := layers.get(now)) is None:
            yield plain[now], tensor
            continue
        with gathered(*(parameter for name, parameter in layer.named_parameters() if name.startswith("lora_"))):
            yield plain[now], merged(layer)


def adapter_state(model: "torch.nn.Module", engine: TrainEngine) -> tuple[dict[str, "torch.Tensor"], str]:
    """The whole adapter in PEFT's format, for the model it started from: tensors by name, and adapter_config.json.
    A collective of all ranks."""
    from peft import get_peft_model_state_dict

    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in engine.full_weights(names)}
    state = get_peft_model_state_dict(model, state_dict=tensors)
    config = model.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr,index]
    if str(config["init_lora_weights"]).startswith("pissa"):
        state, config = plain_lora(model, state, config)
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return {name: tensor.contiguous() for name, tensor in state.items()}, json.dumps(plain, default=str)


def export_policy(
    model: "torch.nn.Module", engine: TrainEngine, processor: "ProcessorMixin", folder: Path | None
) -> None:
    """Write the trained policy to `folder` on the rank that gives one: a plain Hugging Face folder, or for an
    adapted model a PEFT adapter with the processor beside it. A collective of all ranks."""
    if is_adapted(model):
        adapter = adapter_state(model, engine)
        if folder is not None:
            _save_adapter(*adapter, processor, folder)
        return
    weights = engine.full_weights(model.state_dict())
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in weights if folder is not None}
    if folder is not None:
        save_checkpoint(plain_model(model), tensors, processor, folder)


def _save_adapter(tensors: dict[str, "torch.Tensor"], config: str, processor: "ProcessorMixin", folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config)
    processor.save_pretrained(folder)
