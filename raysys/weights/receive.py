"""The rollout actor's half of a push over shared memory: checks what is announced, hands each bucket to the engine's process."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from raysys.buckets import UNDER_WAY, Bucket, Layout, Packed, Placed, Plan
from raysys.errors import BucketError, WeightSyncError
from raysys.memory import Slots, sweep

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SharedMemoryReceiver:
    """Serves one engine on this node: any engine on CPU, and GPU engines that are no peers of a process group."""

    def __init__(self) -> None:
        self._expected: dict[str, tuple[int, ...]] | None = None
        self._dtypes: dict[str, str] = {}
        self._dtype = ""
        self._open = False
        self._mark = ""
        self._layouts: tuple[Layout, ...] = ()
        self._arrived: dict[int, str] = {}
        self._slots = Slots(UNDER_WAY)
        sweep()

    def engine_arguments(self) -> dict[str, Any]:
        """What vLLM's `AsyncEngineArgs` need so that its worker knows the backend."""
        from vllm.config import WeightTransferConfig

        return {
            "worker_extension_cls": "raysys.weights.engine_backend.WeightExtension",
            "weight_transfer_config": WeightTransferConfig(backend="raysys_shared_memory"),
        }

    async def ready(self, engine: Any, model: str) -> None:
        """Once, when the engine is up."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        await self._learn(engine, model)

    async def _learn(self, engine: Any, model: str) -> None:
        self._expected = shapes_of(model)
        self._dtypes = (await engine.collective_rpc("raysys_dtypes"))[0]
        self._dtype = str(engine.model_config.dtype).removeprefix("torch.")

    async def check(self, engine: Any, plan: Plan) -> None:
        """Raises WeightSyncError for the first name, shape or dtype that the engine's model does not have. Touches nothing."""
        if plan.mark == self._mark:
            return  # neither it nor the model has changed since
        manifest = plan.manifest()
        for name, (shape, dtype) in manifest.items():
            if dtype not in (self._dtype, self._dtypes.get(name)):
                raise WeightSyncError(
                    f"tensor {name} is {dtype}, the engine computes in {self._dtype}", "trainer and rollout need one dtype"
                )
            want = self._shape(name)
            if self._expected is not None and tuple(shape) != want:
                raise WeightSyncError(
                    f"tensor {name} has shape {list(shape)}, the engine's model has {list(want) if want else 'no such tensor'}"
                )
        for name in self._expected or ():
            if name not in manifest:
                raise WeightSyncError(f"tensor {name} of the engine's model is not among the {len(manifest)} that are announced")

    def _shape(self, name: str) -> tuple[int, ...] | None:
        expected = self._expected or {}
        if name == "lm_head.weight" and name not in expected:
            name = "model.embed_tokens.weight"  # tied: absent from the file, sent all the same, for an engine may keep a packed copy
        return expected.get(name)

    async def begin(self, engine: Any, plan: Plan) -> None:
        """Opens an update of the engine, closing one that broke off before. What it does not know of the plan it is told."""
        if self._open:
            await engine.finish_weight_update()
        if plan.mark != self._mark:
            self._mark = ""
            await engine.collective_rpc("raysys_expect", args=(plan.text,))
            self._layouts, self._mark = plan.layouts(), plan.mark
        self._arrived = {}
        await engine.start_weight_update()
        self._open = True

    async def update(self, engine: Any, bucket: Bucket) -> None:
        """Raises WeightSyncError for a bucket of another plan, BucketError for one whose bytes are not those that left."""
        self._expect(bucket)
        await self._hand(engine, {"index": bucket.index, "path": self._path(bucket), "digest": bucket.digest})
        for wrong in await engine.collective_rpc("raysys_wrong", args=(bucket.index,)):
            if wrong:
                raise BucketError(self.where(bucket), bucket.index, wrong)
        self._arrived[bucket.index] = bucket.digest

    async def _hand(self, engine: Any, update: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        try:
            await engine.update_weights(WeightTransferUpdateRequest(update_info=update))
        except Exception:
            self._open = False  # vLLM closes an update that raises
            raise

    def _expect(self, bucket: Bucket) -> None:
        if bucket.plan != self._mark or bucket.index >= len(self._layouts):
            raise WeightSyncError(f"bucket {bucket.index} is one of plan {bucket.plan}, announced was {self._mark or 'none'}")
        size = self._layouts[bucket.index].nbytes
        if isinstance(bucket, Packed) and len(bucket.data) != size:
            raise WeightSyncError(f"{self.where(bucket)} came with {len(bucket.data)} bytes, announced were {size}")

    def _path(self, bucket: Bucket) -> str:
        """Where the engine can read a bucket's bytes: where they were placed, or a copy that stays until the next but one comes."""
        if isinstance(bucket, Placed):
            return bucket.path
        if not isinstance(bucket, Packed):
            raise WeightSyncError("weights that never left the GPU cannot be read on the host")
        path, room = self._slots.room(bucket.index, max(layout.nbytes for layout in self._layouts))
        room[: len(bucket.data)] = bucket.data
        return path

    def where(self, bucket: Bucket) -> str:
        """A bucket in words, with its first tensor's name."""
        return f"bucket {bucket.index}" + "".join(f" (from {one.names[0]} on)" for one in self._layouts[bucket.index : bucket.index + 1])

    async def finish(self, engine: Any, version: int) -> list[str]:
        """Digest of each bucket, as arrived. Raises WeightSyncError naming the first announced tensor that never came."""
        missing = [layout for index, layout in enumerate(self._layouts) if index not in self._arrived]
        if missing:
            count = sum(len(layout.names) for layout in missing)
            raise WeightSyncError(f"{count} announced tensors never came, the first is {missing[0].names[0]}")
        await engine.finish_weight_update(weight_version=str(version))
        self._open = False
        return [self._arrived[index] for index in range(len(self._layouts))]

    async def differing(self, engine: Any, bucket: Bucket) -> list[str]:
        """Names of this bucket that can be read back from the engine and are not equal."""
        self._expect(bucket)
        return (await engine.collective_rpc("raysys_differing", args=(self._path(bucket), bucket.index)))[0]

    def close(self) -> None:
        self._slots.close()
        sweep()


def shapes_of(model: str) -> dict[str, tuple[int, ...]] | None:
    """Shape by name from the headers of the safetensors files that the engine was started from; None if there are none.

    Of a folder with an index these are the files that it names: others, such as an adapter's, may lie beside them.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=["*.safetensors", _INDEX], local_files_only=True))
    files, index = sorted(folder.glob("*.safetensors")), folder / _INDEX
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [file for file in files if file.name in named]
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with open(file, "rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes or None
