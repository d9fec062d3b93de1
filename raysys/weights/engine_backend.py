"""The engine's half of a push through memory. vLLM imports this module in its worker process, as `worker_extension_cls`.

Importing it registers two weight-transfer backends with vLLM's factory: chunks arrive as a layout and the name of a memory-mapped
file, or the handle of memory on the GPU; never as pickled tensors.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from raysys.batch import UNDER_WAY
from raysys.weights.digest import digest
from raysys.weights.ipc import Handle

Laid = list[tuple[str, Tensor, Any]]
"""Name, tensor in place, its bytes as a numpy array."""
BACKEND = "raysys_shared_memory"
IPC_BACKEND = "raysys_ipc"


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """One bucket: where its bytes are and what lies at which offset."""

    path: str
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    offsets: list[int]
    digests: list[str]
    stays: bool = False
    """The file is written again for later buckets, so it is kept mapped."""


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads buckets in checkpoint format through vLLM's layerwise reload, and keeps a digest of each tensor as it came."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate
    digests: dict[str, str]
    wrong: list[str]
    """Names in the newest bucket whose bytes are not those that left."""
    _maps: dict[str, tuple[Tensor, dict[str, Laid]]]
    """Files that are written again and again: mapped once, and cut once for each bucket, by its first name."""

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        return None

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.digests, self.wrong, self._maps = {}, [], getattr(self, "_maps", {})
        forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        tensors = self._laid(update_info)
        arrived = [digest(raw) for _, _, raw in tensors]
        self.digests |= zip(update_info.names, arrived, strict=True)
        sent = zip(update_info.names, arrived, update_info.digests, strict=True)
        self.wrong = [name for name, mine, theirs in sent if mine != theirs]
        if self.wrong:
            return  # the receiver asks and says which: an exception would reach it as a line of text
        # The layerwise loader may keep tensors until a layer is whole, beyond the life of this mapping.
        model: Any = self.model
        model.load_weights((name, tensor.to(self.device, copy=True)) for name, tensor, _ in tensors)

    def _laid(self, update_info: SharedMemoryUpdate) -> Laid:
        if not update_info.stays:
            return laid(mapped(update_info.path), update_info)
        if update_info.path not in self._maps:
            for old in list(self._maps)[: len(self._maps) + 1 - UNDER_WAY]:
                del self._maps[old]
            self._maps[update_info.path] = (mapped(update_info.path), {})
        data, cut = self._maps[update_info.path]
        first = update_info.names[0]
        if first not in cut:
            cut[first] = laid(data, update_info)
        return cut[first]

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        return None


@dataclass
class IpcUpdate(WeightTransferUpdateInfo):
    """One bucket on this GPU: what lies at which offset, and the fields of its `raysys.weights.ipc.Handle`."""

    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    offsets: list[int]
    handle: dict[str, Any]


class IpcEngine(SharedMemoryEngine):
    """The same with buckets that lie on this GPU, in the trainer's memory. What arrives is not hashed."""

    update_info_cls: Any = IpcUpdate

    def receive_weights(self, update_info: Any) -> None:
        packed = opened(Handle(**update_info.handle), self.device)
        # The layerwise loader may keep tensors until a layer is whole; the trainer wants its memory back before that.
        model: Any = self.model
        model.load_weights((name, tensor.clone()) for name, tensor in views(packed, update_info))


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


def views(data: Tensor, layout: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a bucket's bytes, in place."""
    for name, shape, dtype, offset in zip(layout.names, layout.shapes, layout.dtypes, layout.offsets, strict=True):
        kind = getattr(torch, dtype)
        size = int(torch.Size(shape).numel()) * kind.itemsize
        yield name, data[offset : offset + size].view(kind).view(tuple(shape))


def laid(data: Tensor, layout: Any) -> Laid:
    """`views` of bytes that the host can read."""
    return [(name, tensor, tensor.reshape(-1).view(torch.uint8).numpy()) for name, tensor in views(data, layout)]


def forget_packed_experts(model: torch.nn.Module) -> None:
    """On CPU a fused expert layer keeps the kernel that packed its first weights; without this a reload is silently ignored."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class WeightExtension:
    """Methods that vLLM's worker gains; called through `collective_rpc`."""

    def raysys_digests(self: Any) -> dict[str, str]:
        """Digest of each tensor of this update, as it arrived."""
        return dict(self.weight_transfer_engine.digests)

    def raysys_wrong(self: Any) -> list[str]:
        """Names in the newest bucket whose bytes are not those that left."""
        return list(self.weight_transfer_engine.wrong)

    def raysys_forget_packed_experts(self: Any) -> None:
        """See `forget_packed_experts`; for backends of vLLM's own, which do not know of it."""
        forget_packed_experts(self.weight_transfer_engine.model)

    def raysys_dtypes(self: Any) -> dict[str, str]:
        """torch dtype by name of what the model holds; fused and packed tensors go by names of their own."""
        model = self.weight_transfer_engine.model
        return {name: str(parameter.dtype).removeprefix("torch.") for name, parameter in model.named_parameters()}

    def raysys_differing(self: Any, layout: dict[str, Any]) -> list[str]:
        """Names whose copy in the engine is readable under the same name and shape, and is not equal."""
        own = dict(self.weight_transfer_engine.model.named_parameters())
        info = SharedMemoryUpdate(**layout)
        tensors = views(mapped(info.path), info)
        return [name for name, tensor in tensors if _readable(own.get(name), tensor.shape) and not _equal(own[name], tensor)]


def _readable(parameter: Tensor | None, shape: Sequence[int]) -> bool:
    return parameter is not None and tuple(parameter.shape) == tuple(shape)


def _equal(parameter: Tensor, tensor: Tensor) -> bool:
    return torch.equal(parameter.detach().cpu().to(tensor.dtype), tensor)


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)
WeightTransferEngineFactory.register_engine(IPC_BACKEND, IpcEngine)
