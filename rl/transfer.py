"""The engine's side of `object_store`: a weight-transfer engine of vLLM that takes tensors from Ray's object store.

vLLM's own transfer engines need GPUs. This one feeds checkpoint-format tensors into the same layer-wise reload,
which is the only safe way into a running CPU engine: its linear weights are repacked after loading.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rl.weights import TransferBackend


@dataclass
class ObjectStoreInit(WeightTransferInitInfo):
    """The object store needs no rendezvous."""


@dataclass
class ObjectStoreUpdate(WeightTransferUpdateInfo):
    """One chunk of checkpoint-format tensors."""

    tensors: dict[str, torch.Tensor]


class ObjectStoreEngine(WeightTransferEngine[ObjectStoreInit, ObjectStoreUpdate]):
    """Receives chunks as arguments of `update_weights`."""

    init_info_cls = ObjectStoreInit
    update_info_cls = ObjectStoreUpdate

    def init_transfer_engine(self, init_info: ObjectStoreInit) -> None:
        """Nothing to meet."""

    def start_weight_update(self) -> None:
        """Prepare every layer to be loaded anew."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take one chunk. Unlike the base class, without synchronising an accelerator that a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ObjectStoreUpdate) -> None:
        """Load one chunk. Objects from the store are read-only memory, of which the reload may keep views."""
        self.model.load_weights((name, tensor.clone()) for name, tensor in update_info.tensors.items())

    def finish_weight_update(self) -> None:
        """Repack what was loaded."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to close."""


def transfer_config(backend: TransferBackend) -> WeightTransferConfig:
    """What an engine is started with so that it can receive weights."""
    return WeightTransferConfig(backend=backend)


# vLLM finds engines by name; this module is imported where one is made.
WeightTransferEngineFactory.register_engine("object_store", ObjectStoreEngine)
