"""What the Dockerfiles say, as far as it can be done without an engine: the control image's build is run as it stands, into an empty
environment, and its edge and scheduler serve from it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
import yaml

from deploy.lock import PROJECT, ROOT, Lock, list_locks
from tests.deploy.chart import CHART, pod_specs, render

DOCKER = ROOT / "deploy/docker"
IMAGES = ("control", "worker")
MAX_CONTROL_MIB = 160
TIMEOUT_S = 120.0
PACKAGES = ("protos", "services", "edge", "scheduler", "worker", "cli")


def instructions(image: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, lines that go on joined."""
    text = re.sub(r"\\\n\s*", "", (DOCKER / f"{image}.Dockerfile").read_text())
    lines = [line.partition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in lines]


def requirements(file: str) -> dict[str, str]:
    """Name to version of a file of pinned requirements."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.partition("[")[0]).lower()


@pytest.mark.parametrize("image", IMAGES)
def test_images_are_of_one_kind(image: str) -> None:
    found = instructions(image)
    names = [name for name, _ in found]
    assert ("USER", "10001:10001") in found and ("ENTRYPOINT", '["ossia"]') in found
    assert names[-1] == "ENTRYPOINT" and names.index("USER") > names.index("COPY") and "HEALTHCHECK" not in names and "ADD" not in names
    (labels,) = (rest for name, rest in found if name == "LABEL")
    assert {"title", "description", "licenses", "version", "revision"} == set(re.findall(r"org\.opencontainers\.image\.(\w+)=", labels))
    for _, command in (one for one in found if one[0] == "RUN"):
        for install in re.findall(r"pip install [^&]*", command):
            assert "--require-hashes" in install or "--no-index" in install
    copied = {word for name, rest in found if name == "COPY" and "--from" not in rest for word in shlex.split(rest)[:-1]}
    ignored = (DOCKER / f"{image}.Dockerfile.dockerignore").read_text().splitlines()
    assert {*PACKAGES, "pyproject.toml"} <= copied
    for path in copied:
        assert (ROOT / path).exists()
        assert any(Path(path).match(line[1:]) for line in ignored if line.startswith("!")), path


@pytest.mark.parametrize("lock", list_locks(), ids=lambda lock: lock.file)
def test_locks_are_whole_hashed_and_what_the_tests_run_with(lock: Lock) -> None:
    pinned = {normal(name): version for name, version in requirements(lock.file).items()}
    assert {normal(re.split(r"[<>=!~; ]", one)[0]) for one in lock.requirements} <= pinned.keys(), "run `python -m deploy.lock`"
    entries = re.split(r"\n(?=\S)", (ROOT / lock.file).read_text().strip())
    assert len(entries) == len(pinned) and all("--hash=sha256:" in entry for entry in entries)
    if lock.is_constrained:
        tested = {normal(name): version for name, version in requirements("constraints.txt").items()}
        assert not {name: (version, tested[name]) for name, version in pinned.items() if tested.get(name, version) != version}


def test_the_control_image_holds_no_model_code_of_others() -> None:
    names = {normal(name) for name in requirements("deploy/docker/control.txt")}
    assert not [name for name in names if name in {"torch", "triton", "transformers", "safetensors", "numpy"} or name.startswith("nvidia")]
    assert {"torch", "triton", "safetensors"} <= {normal(name) for name in requirements("deploy/docker/worker.txt")}


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that the control image's build stage makes: its COPY and RUN lines, with /opt and /src in a folder of ours."""
    root = tmp_path_factory.mktemp("control")
    source = root / "src"
    source.mkdir()
    environment = {**os.environ, "PATH": f"{Path(sys.base_prefix) / 'bin'}:{os.environ['PATH']}"}
    for name, rest in instructions("control"):
        if name == "COPY" and "--from" in rest:
            break
        if name == "COPY":
            *paths, target = shlex.split(rest)
            for path in paths:
                copy(ROOT / path, source / target if len(paths) == 1 and target != "./" else source / target / Path(path).name)
        elif name == "RUN":
            command = rest.replace("/opt/", f"{root}/").replace("--no-cache-dir ", "")
            done = subprocess.run(command, shell=True, cwd=source, env=environment, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return root / "ossia"


def copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(path, target)


def installed(environment: Path) -> list[Distribution]:
    return list(distributions(path=[str(next(environment.glob("lib/python*/site-packages")))]))


def test_the_control_image_installs_exactly_its_list(control: Path) -> None:
    found = {normal(one.name): one.version for one in installed(control)}
    assert found == {**{normal(name): version for name, version in requirements("deploy/docker/control.txt").items()}, "ossia": "0.1.0"}
    for one in installed(control):
        assert one.files and not [file for file in one.files if not Path(file.locate()).exists() and "__pycache__" not in str(file)]


def test_the_control_image_is_small(control: Path) -> None:
    size = sum(path.stat().st_size for path in control.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"control environment: {size / 2**20:.0f} MiB")
    assert size < MAX_CONTROL_MIB * 2**20


@contextmanager
def process(control: Path, *arguments: str, **settings: str) -> Iterator[dict[str, str]]:
    """A process of the image, as the chart starts it; gives the addresses that it announces."""
    environment = {"PATH": f"{control / 'bin'}:/usr/bin:/bin", "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1", **settings}
    with subprocess.Popen([control / "bin/ossia", *arguments], cwd="/", env=environment, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout
            yield json.loads(running.stdout.readline())
        finally:
            running.terminate()
            assert running.wait(TIMEOUT_S) == 0


def get(url: str) -> tuple[int, str]:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=TIMEOUT_S) as response:
        return response.status, response.read().decode()


def test_edge_and_scheduler_serve_from_the_control_image(control: Path) -> None:
    listen = "127.0.0.1:0"
    with process(control, "scheduler", OSSIA_SCHEDULER_LISTEN=listen, OSSIA_SCHEDULER_METRICS_LISTEN=listen) as scheduler:
        assert get(f"http://{scheduler['metrics']}/readyz")[0] == 200
        settings = {"OSSIA_EDGE_REST_LISTEN": listen, "OSSIA_EDGE_GRPC_LISTEN": listen, "OSSIA_EDGE_SCHEDULERS": scheduler["grpc"]}
        with process(control, "edge", **settings) as edge:
            assert get(f"http://{edge['metrics']}/livez")[0] == 200
            assert json.loads(get(f"http://{edge['rest']}/v1/models")[1])["data"] == []
            assert "ossia_edge_open_requests 0.0" in get(f"http://{edge['metrics']}/metrics")[1]


def test_the_downloads_of_the_chart_run_from_the_control_image(control: Path) -> None:
    ended = subprocess.run([control / "bin/ossia", "weights", "--help"], check=True, capture_output=True, text=True)
    assert "fetch" in ended.stdout


def test_the_worker_image_holds_what_the_charts_trial_serves() -> None:
    worker = pod_specs(render({}))["Deployment/demo-ossia-worker-trial"]["containers"][0]
    folder = next(one["value"] for one in worker["env"] if one["name"] == "OSSIA_WORKER_MODEL_DIR")
    assert any(rest.endswith(f"ossia checkpoint expand {folder}") for name, rest in instructions("worker") if name == "RUN")


def test_versions_are_one() -> None:
    for image in IMAGES:
        assert ("ARG", f"VERSION={PROJECT['project']['version']}") in instructions(image)
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == PROJECT["project"]["version"]
