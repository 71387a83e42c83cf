"""The compose file's services get settings that the processes know, and variables that .env.example explains."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from edge.config import EdgeConfig
from scheduler.config import SchedulerConfig
from services.config import ProcessConfig, load_config
from tests.deploy.chart import ROOT, render
from worker.config import WorkerConfig

COMPOSE = ROOT / "deploy/compose"
TEXT = (COMPOSE / "compose.yaml").read_text()
CONFIGS: dict[str, type[ProcessConfig]] = {"edge": EdgeConfig, "scheduler": SchedulerConfig, "worker": WorkerConfig}
VARIABLE = re.compile(r"\$\{(?P<name>\w+):-(?P<default>[^}]*)\}")


def examples() -> dict[str, str]:
    lines = (COMPOSE / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def compose() -> dict[str, Any]:
    """The file as an engine reads it, with the variables of .env.example."""
    found: dict[str, Any] = yaml.safe_load(VARIABLE.sub(lambda variable: examples()[variable["name"]], TEXT))
    return found


def services() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from compose()["services"].items()


def test_the_example_names_every_variable_with_its_default() -> None:
    used = {variable["name"]: variable["default"] for variable in VARIABLE.finditer(TEXT)}
    assert "$" not in VARIABLE.sub("", TEXT)
    assert {**used, "COMPOSE_PROFILES": "cpu"} == examples()


def test_every_part_of_a_cluster_is_there() -> None:
    assert {name for name, _ in services()} == {
        *("etcd", "redis", "scheduler", "worker-cpu", "worker-gpu", "edge", "prometheus", "grafana", "otel-collector")
    }
    assert {name: one["profiles"] for name, one in services() if "worker" in name} == {"worker-cpu": ["cpu"], "worker-gpu": ["gpu"]}


@pytest.mark.parametrize("name", [name for name, one in services() if "OSSIA" in str(one.get("environment"))])
def test_processes_take_their_settings(name: str) -> None:
    service = compose()["services"][name]
    (process,) = service["command"]
    prefix = f"OSSIA_{process.upper()}_"
    settings = {key: str(value) if value is not None else "" for key, value in service["environment"].items()}
    assert all(key.startswith(prefix) for key in settings)
    named = {key.removeprefix(prefix).lower() for key in settings}
    assert named <= CONFIGS[process].model_fields.keys()
    with patch.dict(os.environ, settings, clear=True):
        config = load_config(CONFIGS[process], [])
    assert isinstance(config, WorkerConfig) or config.etcd == ("etcd:2379",)
    if isinstance(config, WorkerConfig):
        config.check()
        assert config.advertise_host == name
    else:
        assert settings[f"{prefix}ADVERTISE"].startswith(f"{name}:")
    assert int(service["stop_grace_period"].removesuffix("s")) > config.drain_s


def test_services_are_hardened_and_reach_each_other_by_name() -> None:
    names, volumes, configs = {name for name, _ in services()}, compose()["volumes"].keys(), compose()["configs"].keys()
    for name, one in services():
        assert one["read_only"] is True and one["cap_drop"] == ["ALL"] and one["security_opt"] == ["no-new-privileges:true"], name
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", one["image"]), name
        assert set(one.get("depends_on", ())) <= names
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", ()))
        for volume in one.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in volumes or (COMPOSE / source).exists(), volume
        assert {config["source"] for config in one.get("configs", ())} <= configs
        if "build" in one:
            assert (COMPOSE / one["build"]["context"] / one["build"]["dockerfile"]).exists()


def test_the_stores_are_those_of_the_chart() -> None:
    chart = {
        container["image"]
        for one in render({})
        if "template" in one.get("spec", {})
        for container in one["spec"]["template"]["spec"]["containers"]
    }
    assert {one["image"] for name, one in services() if name in ("etcd", "redis")} <= chart


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    content = compose()["configs"]["prometheus"]["content"].replace(
        "/etc/prometheus/rules.yaml", str(ROOT / "deploy/prometheus/rules.yaml")
    )
    (tmp_path / "prometheus.yaml").write_text(content)
    checked = subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yaml"], check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_other_configurations_are_whole() -> None:
    contents = {name: yaml.safe_load(one["content"]) for name, one in compose()["configs"].items()}
    pipeline = contents["otel-collector"]["service"]["pipelines"]["traces"]
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) == contents["otel-collector"][kind].keys()
    (provider,) = contents["grafana-dashboards"]["providers"]
    assert any(provider["options"]["path"] in volume for volume in compose()["services"]["grafana"]["volumes"])
    assert contents["grafana-datasources"]["datasources"][0]["url"] == "http://prometheus:9090"
