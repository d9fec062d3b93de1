"""The engine's half of a push through memory. vLLM imports this module in its worker process, as `worker_extension_cls`.

Importing it registers two weight-transfer backends with vLLM's factory: chunks arrive as a bucket's number and the name of a
memory-mapped file, or the handle of memory on the GPU; never as pickled tensors. What lies where in them is said once (`raysys_expect`).
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from raysys.buckets import UNDER_WAY, Layout, Plan, digest
from raysys.weights.ipc import Handle

BACKEND = "raysys_shared_memory"
IPC_BACKEND = "raysys_ipc"


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """One bucket: its number, the file where its bytes are, and their digest as they left."""

    index: int
    path: str
    digest: str


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads buckets in checkpoint format through vLLM's layerwise reload, if their bytes are those that left."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate
    layouts: tuple[Layout, ...]
    wrong: dict[int, list[str]]
    """Buckets of this update that are not as they left: digests of their tensors as they came."""
    maps: dict[str, tuple[Tensor, dict[int, list[Tensor]]]]
    """Files, which are written again and again: mapped once, and cut once for each bucket."""

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        return None

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.wrong = {}
        if self.device.type == "cpu":
            forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        layout, (data, cut) = self.layouts[update_info.index], self._mapped(update_info.path)
        raw = data[: layout.nbytes].numpy()
        if digest(raw) != update_info.digest:
            self.wrong[update_info.index] = layout.digests(raw)
            return  # the receiver asks for it: an exception would reach it as a line of text
        if update_info.index not in cut:
            cut[update_info.index] = layout.tensors(data)
        tensors = zip(layout.names, cut[update_info.index], strict=True)
        # The layerwise loader may keep tensors until a layer is whole, and the file is written anew before that.
        model: Any = self.model
        model.load_weights((name, tensor.to(self.device, copy=True)) for name, tensor in tensors)

    def _mapped(self, path: str) -> tuple[Tensor, dict[int, list[Tensor]]]:
        if path not in self.maps:
            for old in list(self.maps)[: len(self.maps) + 1 - UNDER_WAY]:
                del self.maps[old]
            self.maps[path] = (mapped(path), {})
        return self.maps[path]

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        return None


@dataclass
class IpcUpdate(WeightTransferUpdateInfo):
    """One bucket on this GPU: its number, and the fields of its `raysys.weights.ipc.Handle`."""

    index: int
    handle: dict[str, Any]


class IpcEngine(SharedMemoryEngine):
    """The same with buckets that lie on this GPU, in the trainer's memory. What arrives is not hashed."""

    update_info_cls: Any = IpcUpdate

    def receive_weights(self, update_info: Any) -> None:
        layout, packed = self.layouts[update_info.index], opened(Handle(**update_info.handle), self.device)
        tensors = zip(layout.names, layout.tensors(packed), strict=True)
        # The layerwise loader may keep tensors until a layer is whole; the trainer wants its memory back before that.
        model: Any = self.model
        model.load_weights((name, tensor.clone()) for name, tensor in tensors)


def opened(handle: Handle, device: torch.device) -> Tensor:
    """Another process's memory as a uint8 tensor, without a copy; closed when the last view of it goes."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    here = str(torch.cuda.get_device_properties(device).uuid)
    if handle.device != here:
        raise ValueError(f"the weights lie on GPU {handle.device}, the engine on {here}")
    layout = (torch.Tensor, (handle.size,), (1,), 0, torch.storage.TypedStorage, torch.uint8)
    memory = (device.index, handle.memory, handle.size, handle.start)
    return rebuild_cuda_tensor(*layout, *memory, False, handle.counter, handle.counter_start, handle.event, handle.wait)


def mapped(path: str) -> Tensor:
    """The bytes of a file as a uint8 tensor, without a copy; unmapped when the last view of it goes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # read-only memory: nobody writes through it
        return torch.frombuffer(memory, dtype=torch.uint8)


def forget_packed_experts(model: torch.nn.Module) -> None:
    """On CPU a fused expert layer keeps the kernel that packed its first weights; without this a reload is silently ignored.

    Not for GPUs: kernels there read the layer's own tensors, vLLM writes new weights into these, and CUDA graphs hold on to the kernel.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class WeightExtension:
    """Methods that vLLM's worker gains; called through `collective_rpc`."""

    def raysys_expect(self: Any, plan: str) -> None:
        """What lies where in the buckets of all updates to come: the text of a `raysys.buckets.Plan`."""
        engine = self.weight_transfer_engine
        engine.layouts, engine.maps = Plan("", plan).layouts(), {}

    def raysys_leave(self: Any) -> None:
        """Out of the trainer's group, if there is one: a new one would not give the old one's GPU memory back."""
        self.weight_transfer_engine.shutdown()

    def raysys_wrong(self: Any, index: int) -> list[str]:
        """Digests of a bucket's tensors as they came, nothing if it is as it left."""
        return self.weight_transfer_engine.wrong.get(index, [])

    def raysys_dtypes(self: Any) -> dict[str, str]:
        """torch dtype by name of what the model holds; fused and packed tensors go by names of their own."""
        model = self.weight_transfer_engine.model
        return {name: str(parameter.dtype).removeprefix("torch.") for name, parameter in model.named_parameters()}

    def raysys_differing(self: Any, path: str, index: int) -> list[str]:
        """Names in a bucket whose copy in the engine is readable under the same name and shape, and is not equal."""
        own = dict(self.weight_transfer_engine.model.named_parameters())
        layout = self.weight_transfer_engine.layouts[index]
        tensors = zip(layout.names, layout.tensors(mapped(path)), strict=True)
        return [name for name, tensor in tensors if _readable(own.get(name), tensor.shape) and not _equal(own[name], tensor)]


def _readable(parameter: Tensor | None, shape: Sequence[int]) -> bool:
    return parameter is not None and tuple(parameter.shape) == tuple(shape)


def _equal(parameter: Tensor, tensor: Tensor) -> bool:
    return torch.equal(parameter.detach().cpu().to(tensor.dtype), tensor)


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)
WeightTransferEngineFactory.register_engine(IPC_BACKEND, IpcEngine)
