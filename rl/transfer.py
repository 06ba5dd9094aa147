"""How full weights travel from the trainer's shards to every sampling engine: vLLM's weight-transfer interface.

vLLM's own `nccl` engine does it on GPUs. `object_store`, registered here, carries checkpoint-format tensors
through Ray's object store into vLLM's layer-wise reload, and so works on a CPU.
"""

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import ray
import torch
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rl.engine import TrainEngine
from rl.weights import TransferBackend

if TYPE_CHECKING:
    from ray.actor import ActorHandle

CHUNK_BYTES = 256 << 20
RPC_TIMEOUT_S = 600.0


class ZeroSource(WeightSource):
    """The trainer's weights under their public names, gathered from ZeRO shards one after another."""

    def __init__(self, engine: TrainEngine, names: Mapping[str, str], meta: Sequence[ParamMeta]):
        """`names` maps in-memory to public names; `meta` describes the public tensors in the same order."""
        self._engine = engine
        self._names = dict(names)
        self._meta = list(meta)

    def metadata(self) -> list[ParamMeta]:
        return self._meta

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._engine.full_weights(self._names):
            yield self._names[name], tensor


def describe_weights(model: torch.nn.Module, names: Mapping[str, str]) -> list[ParamMeta]:
    """Name, dtype and full shape of each weight; call it before ZeRO shards the model."""
    tensors = model.state_dict()
    return [ParamMeta(public, tensors[name].dtype, tuple(tensors[name].shape)) for name, public in names.items()]


@dataclass
class ObjectStoreInit(WeightTransferInitInfo):
    """The object store needs no rendezvous."""


@dataclass
class ObjectStoreUpdate(WeightTransferUpdateInfo):
    """One chunk of checkpoint-format tensors."""

    tensors: dict[str, torch.Tensor]


class ObjectStoreEngine(WeightTransferEngine[ObjectStoreInit, ObjectStoreUpdate]):
    """The engine's side: chunks go through vLLM's layer-wise reload, the only safe way into a running CPU engine."""

    init_info_cls = ObjectStoreInit
    update_info_cls = ObjectStoreUpdate

    def init_transfer_engine(self, init_info: ObjectStoreInit) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator after this; a CPU has none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ObjectStoreUpdate) -> None:
        # Objects from the store are read-only memory; the reload may keep views of what it is given.
        self.model.load_weights((name, tensor.clone()) for name, tensor in update_info.tensors.items())

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


@dataclass
class ObjectStoreTrainerInit(TrainerInitInfo):
    """Trainer side of the object store transfer."""

    backend: ClassVar[str] = "object_store"


class ObjectStoreTrainer(TrainerWeightTransferEngine[ObjectStoreTrainerInit]):
    """The trainer's side: rank 0 sends what all ranks gather, in chunks of `CHUNK_BYTES`."""

    init_info_cls = ObjectStoreTrainerInit

    @classmethod
    def trainer_init(
        cls,
        init_info: ObjectStoreTrainerInit,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        if init_info.is_sender:
            client.init_weight_transfer_engine(asdict(ObjectStoreInit()))
        return cls(client=client, source=source, is_sender=init_info.is_sender)

    def send_weights(self) -> None:
        assert self.source is not None
        if self.is_sender:
            self.client.start_weight_update()
        chunk: dict[str, torch.Tensor] = {}
        for name, tensor in self.source:
            if not self.is_sender:
                continue
            chunk[name] = tensor.detach().cpu().clone()
            if sum(value.nbytes for value in chunk.values()) >= CHUNK_BYTES:
                self.client.update_weights({"tensors": chunk})
                chunk = {}
        if self.is_sender:
            self.client.update_weights({"tensors": chunk})
            self.client.finish_weight_update()


class RolloutClient:
    """vLLM's four control calls, fanned out to every rollout worker, each with a time limit."""

    def __init__(self, workers: Sequence["ActorHandle"], ranks_per_worker: int):
        self._workers = workers
        self._ranks_per_worker = ranks_per_worker

    def _call(self, method: str, *arguments: Any) -> None:
        ray.get([getattr(worker, method).remote(*arguments) for worker in self._workers], timeout=RPC_TIMEOUT_S)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each engine takes its own span of ranks in the transfer group, if there is one."""
        calls = []
        for index, worker in enumerate(self._workers):
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += index * self._ranks_per_worker
            calls.append(worker.init_weight_transfer_engine.remote(info))
        ray.get(calls, timeout=RPC_TIMEOUT_S)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", ray.put(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update")


def start_transfer(
    backend: TransferBackend, rank: int, workers: Sequence["ActorHandle"], ranks_per_worker: int, source: WeightSource
) -> TrainerWeightTransferEngine[Any]:
    """Open the transfer on every trainer rank; rank 0 meets the engines.

    `ranks_per_worker` is the tensor-parallel size of one rollout engine.
    """
    if backend == "object_store":
        info: TrainerInitInfo = ObjectStoreTrainerInit(rank=rank)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(
            master_address=ray.util.get_node_ip_address(),
            master_port=_free_port(),
            world_size=len(workers) * ranks_per_worker + 1,
            rank=rank,
        )
    return WeightTransferTrainerFactory.trainer_init(
        info, client=RolloutClient(workers, ranks_per_worker), source=source
    )


def transfer_config(backend: TransferBackend) -> WeightTransferConfig:
    """What an engine is started with so that it can receive weights."""
    return WeightTransferConfig(backend=backend)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


# vLLM finds engines by name; this module is imported wherever one is made.
WeightTransferEngineFactory.register_engine("object_store", ObjectStoreEngine)
WeightTransferTrainerFactory.register_engine("object_store", ObjectStoreTrainer)
