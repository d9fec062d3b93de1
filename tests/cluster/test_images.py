"""The files under docker/ agree with the installer, with Ray's command line and with each other. Building them needs Docker."""

from __future__ import annotations

import fnmatch
import re
import shlex
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import ROOT

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())


def test_the_installer_finds_in_the_image_what_it_reads() -> None:
    before = DOCKERFILE.partition("\nRUN RAYSYS_")[0]
    copied = {name for line in re.findall(r"^COPY --chown=raysys (.+) \S+$", before, re.M) for name in line.split()}
    read = re.findall(r"(?:readme|license-files) = \W*([\w.]+)", (ROOT / "pyproject.toml").read_text())
    assert copied == {"cluster/install.sh", "cluster/constraints.txt", "pyproject.toml", "raysys", *read}
    assert all((ROOT / name).exists() for name in copied)
    for name in re.findall(r"RAYSYS_\w+", DOCKERFILE):
        assert name in (ROOT / "cluster/install.sh").read_text(), f"the installer does not know {name}"


def test_no_token_gets_into_an_image_a_commit_or_a_job() -> None:
    for file in (".dockerignore", ".gitignore", ".rayignore"):
        patterns = (ROOT / file).read_text().split()
        assert any(fnmatch.fnmatch("token", pattern.lstrip("/")) for pattern in patterns), file
    assert COMPOSE["secrets"] == {"raysys-token": {"file": "../token"}} and "RAY_AUTH_TOKEN:" not in str(COMPOSE)


@pytest.mark.parametrize("name", ["head", "node"])
def test_each_container_starts_ray_as_ray_can_be_started(name: str) -> None:
    from ray.scripts.scripts import start

    service = COMPOSE["services"][name]
    environment = service["environment"]
    assert environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/raysys-token"
    assert service["secrets"] == ["raysys-token"] and service["volumes"] == ["shared:/shared"]
    ray, command, *options = shlex.split(service["command"])
    given = start.make_context("start", options).params
    assert (ray, command) == ("ray", "start") and given["block"] and given["disable_usage_stats"]
    assert given["head"] if name == "head" else given["address"] == "head:6379"
    assert service.get("ports", ["127.0.0.1:8265:8265"]) == ["127.0.0.1:8265:8265"], "of the machine only the loopback address"


def test_all_name_one_image() -> None:
    images = {service["image"] for service in COMPOSE["services"].values()}
    assert images == {"raysys:${RAYSYS_BUILD:-cpu}"}
    assert COMPOSE["services"]["head"]["build"]["args"] == {"BUILD": "${RAYSYS_BUILD:-cpu}"}
    kuberay = (ROOT / "cluster/kuberay.yaml").read_text()
    assert "--build-arg BUILD=gpu -t raysys:gpu" in DOCKERFILE and "--build-arg BUILD=gpu -t raysys:gpu" in kuberay
    assert set(re.findall(r"image: (\S+)", kuberay)) == {"raysys:gpu"}
