"""The rollout actor's half of a push over shared memory: checks what is announced, hands each bucket to the engine's process."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raysys.batch import Bucket, Placed
from raysys.errors import WeightSyncError
from raysys.memory import new_path, sweep

Manifest = dict[str, tuple[tuple[int, ...], str]]

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SharedMemoryReceiver:
    """Serves one engine on this node: any engine on CPU, and GPU engines that are no peers of a process group."""

    def __init__(self) -> None:
        self._expected: dict[str, tuple[int, ...]] | None = None
        self._dtypes: dict[str, str] = {}
        self._dtype = ""
        self._open = False
        self._announced: Manifest = {}
        self._arrived: set[str] = set()
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

    async def check(self, engine: Any, manifest: Manifest) -> None:
        """Raises WeightSyncError for the first name, shape or dtype that the engine's model does not have. Touches nothing."""
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

    async def begin(self, engine: Any, manifest: Manifest) -> None:
        """Opens an update of the engine, closing one that broke off before."""
        self._announced, self._arrived = dict(manifest), set()
        if self._open:
            await engine.finish_weight_update()
        await engine.start_weight_update()
        self._open = True

    async def update(self, engine: Any, bucket: Bucket) -> None:
        """Raises WeightSyncError for a tensor that was not announced so, or whose bytes are not those that left."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._expect(bucket)
        with at_hand(bucket) as layout:
            try:
                await engine.update_weights(WeightTransferUpdateRequest(update_info=layout))
            except Exception:
                self._open = False  # vLLM closes an update that raises
                raise
        for wrong in await engine.collective_rpc("raysys_wrong"):
            if wrong:
                raise WeightSyncError(
                    f"tensor {wrong[0]} arrived with other bytes than it left with", "a whole push makes the engine usable again"
                )
        self._arrived.update(bucket.names)

    def _expect(self, bucket: Bucket) -> None:
        for name, shape, dtype in zip(bucket.names, bucket.shapes, bucket.dtypes, strict=True):
            if self._announced.get(name) != (tuple(shape), dtype):
                raise WeightSyncError(f"tensor {name} came as {list(shape)} {dtype}, announced was {self._announced.get(name)}")

    async def _digests(self, engine: Any) -> dict[str, str]:
        return (await engine.collective_rpc("raysys_digests"))[0]

    async def finish(self, engine: Any, version: int) -> dict[str, str]:
        """Digest by name, as arrived. Raises WeightSyncError naming the first announced tensor that never came."""
        missing = [name for name in self._announced if name not in self._arrived]
        if missing:
            raise WeightSyncError(f"{len(missing)} announced tensors never came, the first is {missing[0]}")
        digests = await self._digests(engine)
        await engine.finish_weight_update(weight_version=str(version))
        self._open = False
        return digests

    async def differing(self, engine: Any, bucket: Bucket) -> list[str]:
        """Names of this bucket that can be read back from the engine and are not equal."""
        with at_hand(bucket) as layout:
            return (await engine.collective_rpc("raysys_differing", args=(layout,)))[0]

    def close(self) -> None:
        sweep()


@contextmanager
def at_hand(bucket: Bucket) -> Iterator[dict[str, Any]]:
    """The layout of a bucket and the path of its bytes: where they were placed, or a file for the time of the block."""
    layout = {
        "names": list(bucket.names),
        "shapes": [list(shape) for shape in bucket.shapes],
        "dtypes": list(bucket.dtypes),
        "offsets": list(bucket.offsets),
        "digests": list(bucket.digests),
    }
    if isinstance(bucket, Placed):
        yield layout | {"path": bucket.path, "stays": True}
        return
    path = new_path()
    try:
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(bucket.data.data)
        yield layout | {"path": str(path), "stays": False}
    finally:
        path.unlink(missing_ok=True)


def shapes_of(model: str) -> dict[str, tuple[int, ...]] | None:
    """Shape by name from the headers of the safetensors files that the engine was started from; None if there are none."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=["*.safetensors"], local_files_only=True))
    files = sorted(folder.glob("*.safetensors"))
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with open(file, "rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes or None
