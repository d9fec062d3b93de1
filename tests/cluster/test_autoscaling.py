"""The cluster files are what Ray reads and what the paper's run needs; the pool follows a cluster that grows, loses a node and shrinks."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from raysys import head as heads
from raysys.assembly import Hardware
from raysys.config.runs import GopdConfig
from raysys.errors import ConfigError
from tests.chaos.storm import check_ledger
from tests.cluster.conftest import ROOT

Shape = dict[str, dict[str, Any]]
"""Node types as Ray's autoscaler holds them: `resources`, `min_workers`, `max_workers`."""


# -- the files


def aws() -> dict[str, Any]:
    """`cluster/autoscale.yaml` as `ray up` completes and checks it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster/autoscale.yaml").read_text()))
    validate_config(config)
    return config


def kuberay() -> dict[str, Any]:
    """`cluster/kuberay.yaml`."""
    return yaml.safe_load((ROOT / "cluster/kuberay.yaml").read_text())


def kuberay_seen() -> dict[str, Any]:
    """The same as Ray's autoscaler in the head's pod reads it; checks it too."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    manifest = kuberay()
    manifest["metadata"]["namespace"] = "default"  # the operator's API server adds it
    return _derive_autoscaling_config_from_ray_cr(manifest)


@pytest.mark.parametrize("read", [aws, kuberay_seen])
def test_one_node_takes_the_papers_run_and_eight_a_range_of_workers(read: Callable[[], dict[str, Any]]) -> None:
    config = read()
    types: Shape = config["available_node_types"]
    head, node = types.pop(config["head_node_type"])["resources"], types["gpu"]
    assert head["GPU"] == 0 and head["CPU"] >= 4, "the driver and Ray Data live there"
    assert list(types) == ["gpu"] and (node["min_workers"], node["max_workers"]) == (0, 8) and config["max_workers"] == 8
    run = GopdConfig.load(ROOT / "jobs/configs/gopd/paper.yaml", [])
    ranks = run.scoring.ranks + run.trainer.ranks
    engines = run.rollout.fewest * run.rollout.tensor_parallel
    assert node["resources"]["GPU"] == engines + ranks, "nothing of the first node is idle"
    cpus = run.rollout.fewest + run.scoring.ranks * run.scoring.threads + run.trainer.ranks * run.trainer.threads
    assert node["resources"]["CPU"] >= cpus
    most = GopdConfig.load(ROOT / "jobs/configs/gopd/paper.yaml", ["rollout.workers=1..8"]).rollout.most
    assert most + ranks <= node["max_workers"] * node["resources"]["GPU"]
    assert 5 <= config["idle_timeout_minutes"] <= 30


def test_on_aws_nothing_is_open_and_every_node_has_the_token_and_the_same_python() -> None:
    config, text = aws(), (ROOT / "cluster/autoscale.yaml").read_text()
    assert "umask 077" in text and "0.0.0.0" not in text
    token = "~/.ray/auth_token"  # where Ray looks when no variable names another place
    assert config["file_mounts"][token] == token and f"chmod 600 {token}" in config["worker_setup_commands"]
    starts = {kind: config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")}
    for command in starts.values():
        assert "export PATH=$HOME/raysys/.venv/bin:$PATH" in command and "RAY_AUTH_MODE=token" in command.partition("ray start")[0]
    assert "--dashboard-host=127.0.0.1" in starts["head"] and "--autoscaling-config=~/ray_bootstrap_config.yaml" in starts["head"]
    for kind in ("head", "worker"):
        assert "bash ~/raysys/cluster/install.sh --quiet" in config[f"{kind}_setup_commands"]
    for file in config["file_mounts"].values():
        assert file.startswith("~") or (ROOT / file).exists()
    needed = re.findall(r"(?:readme|license-files) = \W*([\w.]+)", (ROOT / "pyproject.toml").read_text())
    assert {"pyproject.toml", "raysys", "cluster", *needed} <= set(config["file_mounts"].values()), "what the installer reads"


def test_on_kubernetes_nothing_is_open_and_every_pod_has_the_token_and_the_shared_folder() -> None:
    spec = kuberay()["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "raysys-token"}
    text = (ROOT / "cluster/kuberay.yaml").read_text()
    assert "kubectl create secret generic raysys-token --from-file=auth_token=token" in text and "umask 077" in text
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert f"ray=={spec['rayVersion']}" in (ROOT / "cluster/constraints.txt").read_text().splitlines()
    head, (worker,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["serviceType"] == "ClusterIP" and head["rayStartParams"]["dashboard-host"] == "127.0.0.1" and "0.0.0.0" not in text
    assert worker["replicas"] == worker["minReplicas"] == 0
    for group in (head, worker):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["restartPolicy"] == "Never" and container["resources"]["limits"] == container["resources"]["requests"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared", "memory": "/dev/shm"} and {volume["name"] for volume in pod["volumes"]} == set(mounts)
    images = [group["template"]["spec"]["containers"][0]["image"] for group in (head, worker)]
    assert len(set(images)) == 1, "head and workers must run the same versions"


@pytest.mark.parametrize(("launched", "chosen"), [(True, "gpu"), (False, None)])
def test_a_cluster_without_gpus_now_is_taken_for_one_that_will_have_some_if_it_can_grow(
    monkeypatch: pytest.MonkeyPatch, launched: bool, chosen: str | None
) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Labels": {"ray.io/node-group": "ray.head.default"} if launched else {}}])
    run = GopdConfig.load(ROOT / "jobs/configs/gopd/paper.yaml", ["device=gpu"])
    if chosen:
        assert Hardware.choose(run, "auto", 8).device == chosen
    else:
        with pytest.raises(ConfigError, match="needs 8 GPUs, the cluster has 0"):
            Hardware.choose(run, "auto", 8)


# -- a cluster that grows, loses a node and shrinks

_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_HEAD_ID = "f" * 51 + "00000"
"""What the provider calls the head."""
_ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
    "RAY_NODE_TYPE_NAME": "ray.head.default",  # `ray up` sets this, too
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_health_check_period_ms": "1000",  # a killed node is found out after 5 s, not 15
}


def on_this_machine(shipped: dict[str, Any], gcs_port: int) -> dict[str, Any]:
    """The shipped cluster with small nodes that are processes: its node types, its limits; a pace of seconds, nothing to install."""
    config = copy.deepcopy(shipped)
    for name, kind in config["available_node_types"].items():
        head = name == config["head_node_type"]
        size = {"CPU": 8 if head else 1, "GPU": min(1, kind["resources"]["GPU"]), "object_store_memory": 80 << 20}
        kind |= {"resources": size, "node_config": {}}
    # The class by name: as `type: fake_multinode` Ray would look for defaults that its wheel lacks.
    provider = {"type": "external", "module": _PROVIDER, "disable_node_updaters": True, "launch_multiple": True, "head_node_id": _HEAD_ID}
    config |= {"provider": provider | {"gcs_address": f"127.0.0.1:{gcs_port}"}, "auth": {}, "file_mounts": {}, "idle_timeout_minutes": 0.05}
    return config | {key: [] for key in config if key.endswith("_commands")}


@dataclass
class Cluster:
    """The head and, as processes below it, the nodes that its autoscaler started."""

    head: heads.Head

    def below(self) -> list[psutil.Process]:
        return psutil.Process(self.head.pid).children(recursive=True)

    def nodes(self) -> list[psutil.Process]:
        """The raylets but the head's own."""
        found = []
        for one in self.below():
            with suppress(psutil.NoSuchProcess):  # it may end between two questions
                if command(one).partition(" ")[0].endswith("/raylet") and one.ppid() != self.head.pid:
                    found.append(one)
        return found


def command(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head of its own with the shipped cluster's autoscaler; it and all its nodes are gone afterwards."""
    for key, value in _ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    with tempfile.TemporaryDirectory(prefix="raysys-grow-") as folder:
        home, port = Path(folder), heads.free_port()
        (home / "autoscaling.json").write_text(json.dumps(on_this_machine(aws(), port)))
        try:
            with heads.locked(home):
                head = heads.start(home, cpus=8, gcs_port=port, options=[f"--autoscaling-config={home / 'autoscaling.json'}"])
            yield Cluster(head)
        finally:
            heads.remove_traces(home)


class Run:
    """A run of the real loop, pool, pusher and ledger on engines that are none; ends with the block.

    Args:
        folder: its run folder; the log is beside it.
        flags: of `tests.chaos.driver`.
    """

    def __init__(self, head: heads.Head, folder: Path, flags: Sequence[str]):
        folder.mkdir()
        self.folder, self._log = folder, folder.with_suffix(".log")
        with open(self._log, "ab") as log:
            started = [sys.executable, "-u", "-m", "tests.chaos.driver", str(folder), *flags]
            self._process = subprocess.Popen(started, env=head.env | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, stdout=log, stderr=log)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()

    def pace(self, seconds: float) -> None:
        """How long a step of the trainer takes from now on."""
        (self.folder / "pace").write_text(str(seconds))

    @contextmanager
    def held(self) -> Iterator[dict[str, int]]:
        """No engine finishes anything in the block. Gives how many samples each of three has; they all have some."""
        hold = self.folder / "hold"
        hold.touch()
        try:
            self.until(lambda: sum(worker["held"] > 0 for worker in self.workers().values()) == 3, "samples in all engines")
            yield {name: worker["held"] for name, worker in self.workers().items()}
        finally:
            hold.unlink()

    def log(self) -> str:
        return self._log.read_text()

    def workers(self) -> dict[str, dict[str, Any]]:
        """Of the newest status: the pool's workers by name."""
        try:
            status = json.loads((self.folder / "ledger" / "status.json").read_text())
        except OSError:
            return {}
        return {worker["name"]: worker for worker in status["pool"]["workers"]}

    def generating(self) -> set[str]:
        return {name for name, worker in self.workers().items() if worker["tokens"]}

    def until(self, done: Callable[[], bool], what: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert self._process.poll() is None, f"the run ended with {self._process.returncode} before {what}:\n{self.log()[-3000:]}"
            assert time.monotonic() < end, f"not in {seconds:g} s: {what}; {self.workers()}\n{self.log()[-3000:]}"
            time.sleep(0.05)

    def finish(self) -> None:
        assert self._process.wait(timeout=60) == 0, self.log()[-3000:]

    def weights(self) -> np.ndarray:
        return np.load(self.folder / "export" / "trainer" / "weights.npz")["weights"]


def kill(raylet: psutil.Process) -> None:
    """A node as a whole, as if its machine were gone."""
    with suppress(psutil.NoSuchProcess):
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


STEPS = 40


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(240)
def test_the_pool_follows_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    """Engines come on nodes that the autoscaler adds, one is lost with its node, idle ones leave and their nodes with them."""
    shared = ["--order", "in_order", "--steps", str(STEPS), "--patience", "60", "--heartbeat", "60"]
    grown = ["--workers", "1..3", "--device", "gpu", "--seats", "4", "--release-after", "4"]
    with (
        Run(cluster.head, tmp_path / "calm", [*shared, "--workers", "1"]) as calm,
        Run(cluster.head, tmp_path / "run", shared + grown) as run,
    ):
        assert not cluster.nodes(), "the first engine's node has to be asked for, too"
        run.pace(1.0)
        run.until(lambda: bool(run.generating()), "a first engine")
        run.until(lambda: len(run.generating()) == 3 == len(cluster.nodes()), "three engines on three nodes, all with work")
        calm.finish()  # so that no engine of it is on a node

        with run.held() as held:
            kill(cluster.nodes()[-1])
            run.until(lambda: " is lost: " in run.log(), "the loss of an engine is noticed")
        before = set(held)
        run.until(lambda: bool(run.generating() - before), "a new engine with work in place of the lost one")

        run.pace(60.0)  # a long training step: nothing to generate
        run.until(lambda: len(run.workers()) == 1 == len(cluster.nodes()), "idle engines are given back, and their nodes leave")
        run.pace(0.0)
        run.finish()

    log = run.log()
    lost = re.findall(r"(rollout worker \d+) is lost: .*; (\d+) samples go to others", log)
    assert len(lost) == 1 and int(lost[0][1]) == held[lost[0][0]] > 0
    assert json.loads((run.folder / "recovered.json").read_text())["redispatched"] >= held[lost[0][0]]
    assert log.count("had nothing to do for 4 s and is given back") >= 2
    check_ledger(run.folder, STEPS, prompts=8, samples=2, max_age=0, fixed=True)  # none lost, none twice, none with old weights
    assert np.array_equal(run.weights(), calm.weights())
