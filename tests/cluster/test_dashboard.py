"""The Grafana dashboard asks only for what the code emits, and a head's endpoint has it under these names and tags."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from raysys.agent_watch import facts
from raysys.assembly import Pushes, open_metrics
from raysys.batch import Batch, Ragged
from raysys.config.runs import GopdConfig
from raysys.head import Head
from raysys.ledger import Ledger
from raysys.loop import Parts, train
from raysys.report.live import GAUGES, PHASES, Live
from raysys.training.calibrated import CalibAdvObjective
from raysys.watching import Usage
from raysys.weights.push import PushResult
from tests.cluster.conftest import ROOT
from tests.fakes import FakeObjective, FakeScorers, FakeSource, FakeTrainer
from tests.test_agent_watch import step

DASHBOARD = json.loads((ROOT / "cluster/grafana/raysys.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
PREFIX = "ray_"
"""What Ray puts before the name of a gauge that a driver sets."""

STATUS: dict[str, Any] = {
    "phase": "train",
    "trainers": ["trainer rank 0"],
    "scorers": ["scorer 0"],
    "pool": {
        "workers": [
            {"name": "rollout 0", "state": "ready", "version": 3, "tokens": 100, "running": 1, "held": 2, "kv_share": 0.25},
            {"name": "rollout 1", "state": "starting", "version": -1, "tokens": 0, "running": 0, "held": 0},
        ],
        "waiting": 4,
        "redispatched": 1,
        "lost_workers": 2,
    },
    "source": {"groups": 5, "complete": 2, "bytes": 999},
}
RECORD = {"step": 3, "loss": 0.5, "age_max": 1.0, "age/1": 0.5, "seconds": {"total": 2.0, "device/idle": 0.25}}


# -- what the code emits


@dataclass
class Emitted:
    """Metrics by their name at the endpoint: labels, and the values that each label had."""

    labels: dict[str, set[str]] = field(default_factory=dict)
    values: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def matching(self, pattern: str) -> set[str]:
        return {name for name in self.labels if re.fullmatch(pattern, name)}


class AgingSource(FakeSource):
    """Every second row is one version old."""

    def take(self, batch: int, max_age: int) -> Batch:
        now = self._weights.steps
        spans = [[0, max(0, now - row % 2)] for row in range(batch)]
        return super().take(batch, max_age).with_columns(version_spans=Ragged.of(spans, "int32"))


class NamingTrainer(FakeTrainer):
    """Metrics by the names that the real objective and engine give them."""

    def step(self, batch: Batch) -> dict[str, float]:
        super().step(batch)
        return dict.fromkeys(objective_names() | engine_names() | agent_names(), 1.0)


def agent_names() -> set[str]:
    """What `Watched` adds to a step of a search agent."""
    return set(facts(CalibAdvObjective(), step()))


def objective_names() -> set[str]:
    import torch

    from raysys.training.objectives import GopdObjective, Micro, Outputs

    two = torch.zeros(2, 3)
    outputs = Outputs(two, two, torch.ones(2, 3, dtype=torch.bool), None)
    columns: dict[str, torch.Tensor] = dict.fromkeys(("rollout_logprobs", "teacher_logprobs", "reference_logprobs"), two)
    return set(GopdObjective(reward_scale=1.25).loss(outputs, Micro(columns, ("a", "b")))[1])


def engine_names() -> set[str]:
    """The names that `Engine` adds to an objective's: of `meter.part`, `meter.add` and `tally.common`."""
    names: set[Any] = set()
    for node in ast.walk(ast.parse((ROOT / "raysys/training/engine.py").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "meter.part":
            names.add(ast.literal_eval(node.args[0]))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "meter.add":
            names |= keys(node.args[0])
        elif isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "tally.common":
            names |= keys(node.value)
    return names


def keys(node: ast.AST) -> set[Any]:
    assert isinstance(node, ast.Dict)
    return {key.value for key in node.keys if isinstance(key, ast.Constant)}


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emitted]:
    """Two steps of the real loop with every optional part on, and a status with every part, into gauges that take notes."""
    notes = Emitted()

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
            self.name = PREFIX + name
            notes.labels[self.name] = set(tag_keys)

        def set(self, value: float, tags: Mapping[str, str]) -> None:
            assert set(tags) == notes.labels[self.name]
            for label, text in tags.items():
                notes.values[label].add(text)

    folder = tmp_path_factory.mktemp("gopd-1")
    config = GopdConfig.load(None, ["student=s", "teachers.default=t", "data.path=p.jsonl", "batch=4", "steps=2", "max_age=1"])
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr("ray.is_initialized", lambda: True)
        patch.setattr("ray.util.metrics.Gauge", Gauge)
        ledger = Ledger(folder, config)
        stack.callback(ledger.close)
        pool: Any = SimpleNamespace(workers=[1], busy_seconds=lambda: 0.0)
        pusher: Any = SimpleNamespace(push=lambda version: PushResult(version, "ab", 1e-6, {}))
        session: Any = SimpleNamespace(folder=folder, job="gopd")
        evaluator: Any = SimpleNamespace(due=lambda step: True, run=lambda step: False)
        trainer = NamingTrainer()
        writer = open_metrics(config, session, stack, Usage(pool, config))
        parts = Parts(AgingSource(trainer), FakeScorers(), FakeObjective(), trainer, Pushes(pusher), ledger, evaluator, writer)
        train(parts, steps=2, batch=4, max_age=1, checkpoint_every=1)
        Live(folder, "gopd", lambda: STATUS).show()
    yield notes


def test_the_code_emits_at_least_this(emitted: Emitted) -> None:
    assert {PREFIX + name for name in GAUGES} <= set(emitted.labels)
    some = ("step", "loss", "reverse_kl_a", "grad_norm", "age_0", "parity_gap", "seconds_checkpoint", "seconds_device_idle")
    assert {f"ray_raysys_{name}" for name in some} <= set(emitted.labels)
    assert emitted.values["phase"] == set(PHASES)


# -- what the dashboard asks for


@dataclass
class Selector:
    """`name{label="value"}`: the metrics that it can give, and its other matchers as (label, operator, value)."""

    names: set[str]
    matchers: list[tuple[str, str, str]]


def selectors(query: str, emitted: Emitted) -> list[Selector]:
    found = []
    for name, inside in re.findall(r"([a-zA-Z_:][\w:]*)?\{([^}]*)\}", query):
        matchers = re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', inside)
        names = {name} if name else set(emitted.labels)
        for label, operator, value in matchers:
            if label == "__name__":
                hits = emitted.matching(value) if "~" in operator else {value}
                assert hits, f"{query}: no metric is called {value}"
                names = names & hits if operator[0] == "=" else names - hits
        assert names, f"{query}: nothing is left of {inside}"
        found.append(Selector(names, [matcher for matcher in matchers if matcher[0] != "__name__"]))
    return found


@pytest.mark.parametrize(("title", "query"), EXPRESSIONS)
def test_every_metric_and_label_is_emitted(title: str, query: str, emitted: Emitted) -> None:
    chosen = selectors(query, emitted)
    bare = set(re.findall(r"\bray\w+(?!\w*\{)\b", re.sub(r'"[^"]*"', '""', query)))
    assert chosen and not bare, f"{title}: without a selector: {bare}"
    known = {"__name__"} | set(re.findall(r'label_replace\(.*?\}, "(\w+)"', query))
    for selector in chosen:
        assert selector.names <= set(emitted.labels), f"{title}: nobody emits {selector.names - set(emitted.labels)}"
        assert {("job", "=", "$job"), ("run", "=", "$run")} <= set(selector.matchers), f"{title}: of which run?"
        for label, _, value in selector.matchers:
            for name in selector.names:
                assert label in emitted.labels[name], f"{title}: {name} has no label {label}"
            assert value.startswith("$") or value in emitted.values[label], f"{title}: {label} is never {value}"
        known |= set.union(*(emitted.labels[name] for name in selector.names))
    for inside in re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", query):
        assert {label.strip() for label in inside.split(",")} <= known, f"{title}: by {inside}"


@pytest.mark.parametrize(("title", "query"), EXPRESSIONS)
def test_relabelling_takes_each_name_apart(title: str, query: str, emitted: Emitted) -> None:
    for inside, source, pattern in re.findall(r'label_replace\((\{[^}]*\}), "\w+", "\$1", "(\w+)", "([^"]*)"\)', query):
        assert source == "__name__"
        for name in selectors(inside, emitted)[0].names:
            assert re.fullmatch(pattern, name), f"{title}: {pattern} does not match {name}"
    assert query.count("label_replace") == len(re.findall(r"label_replace\(\{", query))


def test_legends_name_labels_that_the_query_keeps() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            kept = set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", target["expr"]))))
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, panel["title"]


def test_variables_are_found_where_a_run_has_them(emitted: Emitted) -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "run", "price"]
    assert variables["datasource"]["type"] == "datasource" and variables["price"]["type"] == "constant"
    for name in ("job", "run"):
        query = variables[name]["query"]["query"]
        assert re.fullmatch(rf"label_values\(.*, {name}\)", query) and query == variables[name]["definition"]
        for selector in selectors(query, emitted):
            assert all(name in emitted.labels[metric] for metric in selector.names)
    used = set(re.findall(r"\$\{?([a-z_]+)", json.dumps(DASHBOARD["panels"]))) - {"__range"}
    assert used == set(variables)


def test_phases_are_told_apart_by_their_own_names() -> None:
    panel = next(panel for panel in PANELS if panel["type"] == "state-timeline")
    texts = {number: shown["text"] for number, shown in panel["fieldConfig"]["defaults"]["mappings"][0]["options"].items()}
    asked = dict(re.findall(r'(\d+) \* [^{]*\{[^}]*phase="(\w+)"', panel["targets"][0]["expr"]))
    assert texts == asked and set(texts.values()) == set(PHASES)


def test_panels_have_ids_places_and_words_of_their_own() -> None:
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    for panel in PANELS:
        assert panel["title"] and panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for one, other in combinations(everything, 2):
        a, b = one["gridPos"], other["gridPos"]
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart, f"{one['title']} lies on {other['title']}"
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in everything)
    rows = [panel["title"] for panel in everything if panel["type"] == "row"]
    assert rows == ["Training", "Rollout", "Staleness", "Time and cost", "Search agent"]


# -- what a head has

DRIVER = """
import json, sys
from pathlib import Path
import ray
from raysys.report.live import Live
from raysys.report.metrics import MetricsWriter

ray.init(log_to_driver=False)
folder, status, record = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
with MetricsWriter(folder, "gopd", folder.name) as writer:
    writer.write(record)
Live(folder, "gopd", lambda: status).show()
print("set", flush=True)
sys.stdin.read()
"""


def test_a_head_shows_what_a_driver_sets(ray_head: Head, tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    env = ray_head.env | {"RAY_metrics_report_interval_ms": "1000"}
    command = [sys.executable, "-c", DRIVER, str(tmp_path), json.dumps(STATUS), json.dumps(RECORD)]
    tags = {"job": "gopd", "run": tmp_path.name}
    wanted = {
        ("ray_raysys_loss", 0.5): tags,
        ("ray_raysys_age_1", 0.5): tags,
        ("ray_raysys_seconds_device_idle", 0.25): tags,
        ("ray_raysys_step", 3.0): tags,
        ("ray_raysys_lost_workers_total", 2.0): tags,
        ("ray_raysys_groups", 2.0): tags | {"state": "complete"},
        ("ray_raysys_actor_kv_share", 0.25): tags | {"actor": "rollout 0"},
        ("ray_raysys_actor_phase", 1.0): tags | {"actor": "trainer rank 0", "phase": "training"},
    }
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None and driver.stdout.readline().strip() == "set"
            file = ray_head_list(ray_head)
            deadline = time.monotonic() + 60
            while missing := [key for key, labels in wanted.items() if not any(shows(one, *key, labels) for one in samples(file))]:
                assert time.monotonic() < deadline, f"not at the endpoints of {file}: {missing}"
                time.sleep(0.25)
        finally:
            driver.kill()


def ray_head_list(head: Head) -> Path:
    """The list of endpoints, where cluster/prometheus.yml looks for it below its link to the head's temporary folder."""
    scrape = yaml.safe_load((ROOT / "cluster/prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["honor_labels"] is True, "else Prometheus renames the tag `job`"
    (path,) = scrape["file_sd_configs"][0]["files"]
    link = "../.raysys/ray/"
    assert path.startswith(link)
    return Path(head.temp, path.removeprefix(link))


def samples(file: Path) -> list[Any]:
    from prometheus_client.parser import text_string_to_metric_families

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    found: list[Any] = []
    for target in json.loads(file.read_text())[0]["targets"] if file.exists() else []:
        try:
            with opener.open(f"http://{target}/metrics", timeout=3) as reply:
                text = reply.read().decode()
        except (urllib.error.URLError, OSError):
            continue
        ours = "\n".join(line for line in text.splitlines() if "ray_raysys_" in line)
        found += [sample for family in text_string_to_metric_families(ours + "\n") for sample in family.samples]
    return found


def shows(sample: Any, name: str, value: float, labels: dict[str, str]) -> bool:
    return sample.name == name and sample.value == value and labels.items() <= sample.labels.items()
