"""A push inside a GPU. Where there is none, a file stands for the trainer's memory and all else is real."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raysys.assembly import Hardware, receiver_for, start_all
from raysys.buckets import Bucket, Layout, Plan, digest, fingerprint
from raysys.config.parts import Deadlines, Rollout, Trainer, Weights
from raysys.config.runs import GopdConfig, NewModel, SftConfig
from raysys.errors import ConfigError, DeadlineError, InfrastructureError, WeightSyncError
from raysys.rollout.members import Member
from raysys.rollout.pool import RolloutPool
from raysys.rollout.spec import RolloutSpec
from raysys.weights import push as pushing
from raysys.weights.ipc import Handle, IpcReceiver, IpcSender, Offer
from raysys.weights.push import Pusher
from tests.weights.trainer import replanned

SMALL = NewModel(hidden_size=64, heads=2, kv_heads=2, ffn_size=96, context=64)
IDS = [5, 90, 17, 33, 64, 8, 71, 22, 45]
MEMORY = Path("/dev/shm")


PLAN = Plan.of([Layout.of({name: ((2,), "float32", 8)}) for name in "abcd"])


def handle(device: str = "GPU-a") -> Handle:
    return Handle(device, b"m", 8, 0, b"c", 0, b"e", True)


# -- the whole push with a real trainer and a real engine


def reused(path: Path) -> None:
    """What becomes of a GPU's memory when it is freed: whoever still reads it finds something else."""
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    path.unlink()


class FileSender(IpcSender):
    """What is offered lies in a file, for as long as the tensor lives that was offered."""

    def _handle(self, packed: Any) -> Handle:
        path = MEMORY / f"raysys-twin-{os.getpid()}-{id(packed)}"
        path.write_bytes(packed.numpy().data)
        weakref.finalize(packed, reused, path)
        return Handle("file", str(path).encode(), packed.numel(), 0, b"", 0, b"", False)

    def _collect(self) -> None:
        return None


class FileReceiver(IpcReceiver):
    def engine_arguments(self) -> dict[str, Any]:
        return super().engine_arguments() | {"worker_extension_cls": "tests.weights.file_backend.Extension"}


class Second(Member):
    """An engine that lives beside rank 1."""

    place = 1


DEADLINES = Deadlines(placement=60, start=200, train=60, push=60, heartbeat=20)


@pytest.fixture(scope="module")
def cluster(ray_head: Any) -> Iterator[Any]:
    import ray  # not earlier: Ray reads whether it needs a token when it is imported

    ray.init(address=ray_head.gcs, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def pair(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, RolloutPool]]:
    """Two ZeRO-3 ranks, and an engine beside the second."""
    from raysys.models.scratch import new_causal
    from raysys.training.group import TrainerGroup
    from raysys.training.objectives import GopdObjective

    folder = str(new_causal(SMALL, tmp_path_factory.mktemp("model"), seed=0))
    rollout, trainer = Rollout(kv_cache_mib=16), Trainer(ranks=2, zero_stage=3, threads=1, micro_batch_tokens=64)
    spec = RolloutSpec(folder, "cpu", "float32", max_model_len=40, config=rollout, receiver=FileReceiver, log_dir=folder)
    with (
        TrainerGroup(trainer, folder, GopdObjective(), 1e-2, 10, 0, 1.0, "cpu", "float32", DEADLINES) as group,
        RolloutPool(rollout, spec, DEADLINES, member=Second) as pool,
    ):
        start_all(trainer=group.start, rollout=pool.start)
        yield group, pool


@pytest.fixture
def pusher(pair: tuple[Any, RolloutPool], monkeypatch: pytest.MonkeyPatch) -> Pusher:
    """A pusher whose model travels in several buckets."""
    monkeypatch.setattr(pushing, "IpcSender", FileSender)
    made = Pusher(*pair, Weights(backend="ipc"), DEADLINES)
    made._plan = pair[0].bucket_plan(100_000)
    made._layouts = made._plan.layouts()
    assert len(made._layouts) > 3
    return made


def gap(pair: tuple[Any, RolloutPool]) -> float:
    """Between engine and trainer, on a sequence that no push probes."""
    import ray

    group, pool = pair
    return float(np.abs(ray.get(pool.workers[0].handle.probe.remote(IDS), timeout=60) - group.probe_logprobs(IDS)).max())


@pytest.mark.slow
def test_an_engine_computes_with_what_the_rank_beside_it_offers(pair: tuple[Any, RolloutPool], pusher: Pusher):
    import ray

    from tests.training.work import gopd_batch

    group, marks = pair[0], []
    for version in (1, 2, 3):
        group.step(gopd_batch(seed=version))
        assert gap(pair) > 0.01
        result = pusher.push(version)
        assert result.parity_gap < 1e-4 and gap(pair) < 1e-4
        assert not list(MEMORY.glob("raysys-twin-*")), "what was offered is not freed"
        marks.append(result.fingerprint)
    buckets = ray.get([group.gather_bucket(index) for index in range(len(pusher._layouts))])
    assert fingerprint(pusher._plan.mark, [one.digest for one in buckets]) == marks[-1] and len(set(marks)) == 3


@pytest.mark.slow
def test_all_ranks_gather_the_wanted_offer_and_the_first_says_what_left(pair: tuple[Any, RolloutPool], pusher: Pusher):
    import ray

    first, second = ray.get(pair[0].offer_bucket(0, FileSender, {1}))
    assert type(first) is Bucket and type(second) is Offer
    assert (second.plan, second.index, second.digest) == (first.plan, first.index, "") == (pusher._plan.mark, 0, "")
    assert digest(Path(second.handle.memory.decode()).read_bytes()) == first.digest
    pair[0].withdraw_buckets()


@pytest.mark.slow
def test_what_does_not_fit_is_refused_by_name_before_anything_is_offered(pair: tuple[Any, RolloutPool], pusher: Pusher):
    pusher.push(4)
    pusher._plan = replanned(pusher._plan, {"model.norm.weight": ((65,), "float32")})
    with pytest.raises(WeightSyncError, match=r"model.norm.weight has shape \[65\], the engine's model has \[64\]"):
        pusher.push(5)
    assert gap(pair) < 1e-4 and not list(MEMORY.glob("raysys-twin-*"))


@pytest.mark.slow
def test_a_handle_that_cannot_be_opened_is_our_error_and_a_whole_push_cures_it(pair: tuple[Any, RolloutPool], pusher: Pusher):
    import ray

    pusher.push(6)
    group, (member,) = pair[0], pair[1].workers
    ray.get(member.handle.begin_update.remote(pusher._plan))
    offer = ray.get(group.offer_bucket(0, FileSender, {1}))[1]
    lost = replace(offer, handle=replace(offer.handle, memory=b"/dev/shm/raysys-nothing"))
    with pytest.raises(WeightSyncError, match=r"could not load bucket 0 \(from .* on\): .*raysys-nothing"):
        ray.get(member.handle.update.remote(lost))
    assert pusher.push(7).parity_gap < 1e-4 and gap(pair) < 1e-4


# -- who does what when


class Twin:
    """A trainer of two ranks: offers are numbers, and its log says when which was asked for."""

    def __init__(self, listeners: list[Any]):
        self.listeners, self.log = listeners, []
        self.parts: dict[int, Any] = {}

    def bucket_plan(self, max_bytes: int) -> Plan:
        return PLAN

    def memory(self) -> str:
        return ""

    def offer_bucket(self, index: int, sender: Any, readers: Collection[int]) -> list[Any]:
        import ray

        assert sender is IpcSender
        if index >= 2:  # the memory of the one before the last is taken back by this
            assert index - 2 in [heard for heard, _ in ray.get(self.listeners[0].seen.remote())]
        self.log.append((index, set(readers)))
        mine = Bucket(PLAN.mark, index, f"digest-{index}")
        offers = [Offer(**vars(mine), handle=handle(f"rank {rank}")) for rank in range(2)]
        return [self.parts.get(rank) or ray.put(offer if rank in readers else mine) for rank, offer in enumerate(offers)]

    def withdraw_buckets(self) -> None:
        self.log.append("withdraw")

    def probe_logprobs(self, ids: Any) -> np.ndarray:
        return np.zeros(len(ids) - 1, np.float32)


class Listener:
    """Takes offers; dies of the bucket `poison`."""

    def __init__(self, poison: int = -1):
        self.heard: list[tuple[int, str]] = []
        self._poison = poison

    def limits(self) -> dict[str, int]:
        return {"vocabulary": 50, "length": 10}

    def begin_update(self, plan: Any) -> None:
        assert plan == PLAN

    def update(self, offer: Offer) -> None:
        if offer.index == self._poison:
            os._exit(1)
        self.heard.append((offer.index, offer.handle.device))

    def finish_update(self, version: int) -> list[str]:
        return [""] * 4

    def probe(self, ids: Any) -> np.ndarray:
        return np.zeros(len(ids) - 1, np.float32)

    def seen(self) -> list[tuple[int, str]]:
        return self.heard


@dataclass(eq=False)
class One:
    name: str
    handle: Any
    place: int
    state: str = "ready"


class Room:
    """A pool of two, the first beside rank 1, the second beside rank 0."""

    def __init__(self, handles: list[Any]):
        self.workers = [One(f"worker {at}", one, place=1 - at) for at, one in enumerate(handles)]
        self.lost: list[str] = []

    def await_worker(self) -> None:
        raise AssertionError("somebody is always there")

    def pushed(self, version: int, members: Any) -> None:
        self.current = [member.name for member in members]

    def lose(self, member: Any, cause: str) -> None:
        self.lost.append(f"{member.name}: {cause}")


def twin(cluster: Any, *poisons: int) -> tuple[Twin, Room]:
    """Trainer and pool, of listeners that die of these buckets."""
    listeners = [cluster.remote(Listener).options(num_cpus=0).remote(poison) for poison in poisons]
    return Twin(listeners), Room(listeners)


def twin_pusher(trainer: Twin, pool: Room, seconds: float = 30) -> Pusher:
    return Pusher(trainer, pool, Weights(backend="ipc"), Deadlines(push=seconds))  # type: ignore[arg-type]


def test_each_engine_is_served_by_its_rank_two_buckets_are_alive_and_none_afterwards(cluster: Any):
    trainer, pool = twin(cluster, -1, -1)
    result = twin_pusher(trainer, pool).push(1)
    assert trainer.log == [(0, {0, 1}), (1, {0, 1}), (2, {0, 1}), (3, {0, 1}), "withdraw"]
    heard = cluster.get([listener.seen.remote() for listener in trainer.listeners])
    assert heard == [[(index, f"rank {rank}") for index in range(4)] for rank in (1, 0)]
    assert result.fingerprint == fingerprint(PLAN.mark, [f"digest-{index}" for index in range(4)])
    assert pool.current == ["worker 0", "worker 1"] and not pool.lost


def test_an_engine_that_dies_in_a_push_is_given_up_and_its_rank_offers_nothing_more(cluster: Any):
    trainer, pool = twin(cluster, -1, 1)
    twin_pusher(trainer, pool).push(1)
    assert trainer.log[-2:] == [(3, {1}), "withdraw"] and pool.current == ["worker 0"]
    assert len(pool.lost) == 1 and pool.lost[0].startswith("worker 1: worker 1 died during 'update'")
    assert cluster.get(trainer.listeners[0].seen.remote()) == [(index, "rank 1") for index in range(4)]


def test_a_rank_that_fails_or_is_late_stops_the_push_as_the_trainer_and_costs_no_engine(cluster: Any):
    @cluster.remote(num_cpus=0)
    def fails() -> None:
        raise RuntimeError("out of memory")

    @cluster.remote(num_cpus=0)
    class Stuck:
        async def part(self) -> None:
            await asyncio.sleep(600)

    trainer, pool = twin(cluster, -1, -1)
    trainer.parts = {1: fails.remote()}
    with pytest.raises(InfrastructureError, match=r"the trainer .*'update'.*out of memory"):
        twin_pusher(trainer, pool).push(1)
    assert trainer.log[-1] == "withdraw" and not pool.lost
    trainer.parts = {1: Stuck.remote().part.remote()}
    with pytest.raises(DeadlineError, match=r"the trainer did not finish 'give its part of 'update'' within 5 s .*deadlines.push"):
        twin_pusher(trainer, pool, seconds=5).push(2)
    assert trainer.log[-1] == "withdraw" and not pool.lost


# -- the halves


def test_an_offer_is_kept_until_two_more_are_made_and_all_are_freed_at_the_end():
    import torch

    sender, alive = FileSender(), []
    for index in range(3):
        packed = torch.zeros(8, dtype=torch.uint8)
        assert sender.offer(Bucket(PLAN.mark, index, ""), packed).index == index
        alive.append(weakref.ref(packed))
        del packed
    gc.collect()
    assert [one() is not None for one in alive] == [False, True, True]
    sender.free()
    gc.collect()
    assert [one() for one in alive] == [None] * 3 and not list(MEMORY.glob(f"raysys-twin-{os.getpid()}-*"))


@pytest.mark.slow
def test_what_torch_shares_is_what_the_engine_opens_and_only_on_the_same_gpu(monkeypatch: pytest.MonkeyPatch):
    """Field by field, against the names of torch's own function: their order is no promise."""
    import torch
    from torch.multiprocessing import reductions

    from raysys.weights import engine_backend

    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    packed, found = torch.zeros(640, dtype=torch.uint8), {}
    shared = {"tensor_cls": torch.Tensor, "tensor_size": (640,), "tensor_stride": (1,), "tensor_offset": 0} | {
        "storage_cls": torch.storage.TypedStorage,
        "dtype": torch.uint8,
        "storage_device": 0,
        "storage_handle": b"handle",
        "storage_size_bytes": 640,
        "storage_offset_bytes": 4096,
        "requires_grad": False,
        "ref_counter_handle": b"counter",
        "ref_counter_offset": 3,
        "event_handle": b"event",
        "event_sync_required": True,
    }
    assert list(shared) == names
    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: (None, tuple(shared.values())))
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *arguments: found.update(zip(names, arguments, strict=True)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{torch.device(device)}"))
    made = IpcSender().offer(Bucket(PLAN.mark, 0, ""), packed).handle
    assert made.device == "GPU-cpu" and json.dumps([value for value in vars(made).values() if not isinstance(value, bytes)])
    engine_backend.opened(replace(made, device="GPU-cuda:5"), torch.device("cuda", 5))  # to each process its GPUs' own numbers
    assert found == shared | {"storage_device": 5}
    with pytest.raises(ValueError, match="the weights lie on GPU GPU-cpu, the engine on GPU-cuda:1"):
        engine_backend.opened(made, torch.device("cuda", 1))


def test_an_offer_that_was_not_announced_is_refused_and_nothing_is_asked_of_the_engine():
    receiver = IpcReceiver()
    with pytest.raises(WeightSyncError, match=f"bucket 1 is one of plan {PLAN.mark}, announced was none"):
        asyncio.run(receiver.update(None, Offer(PLAN.mark, 1, "", handle())))


def test_impossible_backends_get_one_line_with_the_key():
    keys = ["student=s", "teachers.default=t", "data.path=p"]
    with pytest.raises(ConfigError, match=r"weights.backend=ipc .* needs colocate=true"):
        GopdConfig.load(None, [*keys, "weights.backend=ipc"])
    with pytest.raises(ConfigError, match=r"weights.backend=nccl .* colocate=true shares them: use ipc"):
        GopdConfig.load(None, [*keys, "weights.backend=nccl", "colocate=true"])
    with pytest.raises(ConfigError, match=r"weights.backend=ipc .* needs colocate=true"):
        SftConfig.load(None, ["data.path=p", "weights.backend=ipc"])
    config = GopdConfig.load(None, [*keys, "weights.backend=ipc", "colocate=true"])
    with pytest.raises(ConfigError, match=r"^weights.backend=ipc needs GPUs \(use auto or shared_memory\)$"):
        receiver_for(config, Hardware("cpu", "float32"))
    assert receiver_for(config, Hardware("gpu", "bfloat16")) is IpcReceiver
