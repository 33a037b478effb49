"""The compose files and the Dockerfile, read as data: pinned, closed to the outside, not root, naming real files."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
GPU: dict[str, Any] = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
services = pytest.mark.parametrize("name", SERVICES)


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined and comments dropped."""
    lines = "\n".join(line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {"": []}
    current = ""
    for word, rest in instructions():
        if word == "FROM":
            current = rest.split(" AS ")[1]
            found[current] = []
        found[current].append((word, rest))
    return found


def test_the_stack_is_server_monitoring_and_load() -> None:
    assert set(SERVICES) == {"server", "prometheus", "grafana", "locust"}
    assert SERVICES["locust"]["profiles"] == ["load"]
    assert not [name for name in SERVICES if name != "locust" and "profiles" in SERVICES[name]]


@services
def test_every_image_is_pinned(name: str) -> None:
    image = SERVICES[name]["image"]
    assert not image.endswith(":latest")
    assert re.search(r":(v?\d+\.\d+\.\d+|cpu)$", image), image


@services
def test_every_port_is_published_on_loopback_only(name: str) -> None:
    for port in SERVICES[name]["ports"]:
        assert port.startswith("127.0.0.1:"), port


@services
def test_no_service_runs_as_root_or_with_privileges(name: str) -> None:
    service = SERVICES[name]
    assert int(service["user"].split(":")[0]) > 0
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service.get("network_mode") != "host"


@services
def test_every_service_is_checked_and_stops_in_time(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert "stop_grace_period" in service
    assert service["restart"] == "unless-stopped"


@services
def test_every_mounted_file_exists(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (DOCKER / source).exists(), source
        else:
            assert source in COMPOSE["volumes"], source


def test_load_waits_for_a_healthy_server() -> None:
    assert SERVICES["locust"]["depends_on"] == {"server": {"condition": "service_healthy"}}


def test_the_gpu_file_only_overrides_the_server() -> None:
    assert set(GPU["services"]) == {"server"}
    assert GPU["services"]["server"]["build"]["target"] == "cuda"
    devices = GPU["services"]["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]


def test_build_targets_of_the_compose_files_exist_and_cpu_is_the_default() -> None:
    assert {SERVICES["server"]["build"]["target"], GPU["services"]["server"]["build"]["target"]} <= set(stages())
    assert list(stages())[-1] == "cpu", "the last stage is what a plain docker build makes"


def test_the_image_runs_the_server_as_process_one_without_root() -> None:
    runtime = dict(stages()["runtime"])
    assert runtime["USER"] == "10001:0"
    assert runtime["STOPSIGNAL"] == "SIGTERM"
    assert runtime["EXPOSE"] == "8000"
    assert runtime["ENTRYPOINT"] == '["python", "-m", "server"]'
    assert runtime["CMD"].startswith('["serve"')
    assert '"python", "-c"' in runtime["HEALTHCHECK"]
    assert "curl" not in DOCKERFILE
    for name in ("cpu", "cuda"):
        assert "USER" not in dict(stages()[name]), "the targets keep the runtime's user"


@pytest.mark.parametrize("label", ["title", "description", "version", "revision", "created"])
def test_the_image_says_what_it_is(label: str) -> None:
    assert f"org.opencontainers.image.{label}=" in DOCKERFILE


def test_what_is_copied_exists_and_is_in_the_build_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [rest.split()[0] for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    assert {"pyproject.toml", "kernels", "scheduler", "server", "configs"} == set(copied)
    for source in copied:
        assert f"!{source}" in ignored, source


def test_kernels_are_built_into_the_image_where_the_loader_looks_first() -> None:
    tree = " ".join(rest for word, rest in stages()["tree"] if word == "RUN")
    assert "python -m kernels.cpu.build --all --directory kernels/cpu/prebuilt" in tree
    assert "chmod -R a+rX,go-w /app" in tree, "the loader refuses libraries that others may write"


def test_the_torch_of_the_image_is_the_pinned_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = [entry for entry in project["dependencies"] if entry.startswith("torch=")]
    assert re.findall(r"^ARG TORCH=(\S+)$", DOCKERFILE, re.M) == [torch, torch]
    assert f"TORCH ?= {torch}\n" in (ROOT / "Makefile").read_text()


def test_the_locust_image_is_the_version_that_the_tests_ran() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (locust,) = [entry for entry in project["optional-dependencies"]["bench"] if entry.startswith("locust")]
    assert SERVICES["locust"]["image"] == f"locustio/locust:{locust.split('==')[1]}"
