"""The chart as it is rendered, run as real processes: its settings make a cluster, and its `helm test` passes against it."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli import checkpoint
from cli.certificates import write_certificates
from tests.deploy.chart import CHART, Manifest, Values, of_kind, pod_specs, render
from tests.fakes.free_port import free_port

START_TIMEOUT_S = 240.0
END_TIMEOUT_S = 120.0
PODS = {
    "etcd": "StatefulSet/demo-ossia-etcd",
    "scheduler": "Deployment/demo-ossia-scheduler",
    "worker": "Deployment/demo-ossia-worker-trial",
    "edge": "Deployment/demo-ossia-edge",
}
GUARDED: Values = {
    "tls": {"enabled": True, "existingSecrets": dict.fromkeys(PODS, "certificates")},
    "auth": {"apiKeys": {"existingSecret": "keys"}},
    "tests": {"existingSecret": "key"},
}
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Machine:
    """This machine in the place of a cluster's: each name, folder and port of the chart is one of ours."""

    folder: Path
    ports: dict[str, int]  # by the number in the chart, those of the metrics by process

    def move(self, process: str, value: str) -> str:
        for text, ours in {
            "0.0.0.0": "127.0.0.1",
            "$(POD_IP)": "127.0.0.1",
            "$(POD_NAME)": f"{process}-0",
            "demo-ossia-etcd": "127.0.0.1",
            "demo-ossia-edge.serving.svc:80": "127.0.0.1:8000",
            "/opt/ossia/models/ossia-nano": str(self.folder / "model"),
            "/var/lib/etcd": str(self.folder / "etcd"),
            "/etc/ossia/api-keys": str(self.folder),
            "/etc/ossia/key": str(self.folder),
            "/etc/ossia/tls": str(self.folder / "tls" / ("edge" if process == "etcd" else process)),
        }.items():
            value = value.replace(text, ours)
        return re.sub(r"(?<=:)\d{4}\b", lambda port: str(self.ports[process if port[0] == "9090" else port[0]]), value)

    def environment(self, process: str, container: Manifest) -> dict[str, str]:
        settings = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        settings.pop("OSSIA_EDGE_REDIS_URL", None)  # one edge limits by itself
        moved = {name: self.move(process, value) for name, value in settings.items()}
        return {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **moved}

    @contextmanager
    def running(self, process: str, container: Manifest) -> Iterator[None]:
        """The container's process, from the answer of its last probe to its end by SIGTERM."""
        command = [str(shutil.which("etcd"))] if process == "etcd" else [sys.executable, "-m", *container["args"]]
        log = self.folder / f"{process}.log"
        with log.open("wb") as out:
            child = subprocess.Popen(command, env=self.environment(process, container), stdout=out, stderr=out)
        try:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if process != "etcd":
                    self.wait_for(process, container[probe]["httpGet"]["path"], child)
            yield
            assert child.poll() is None, log.read_text()
        finally:
            child.terminate()
            child.wait(END_TIMEOUT_S)

    def wait_for(self, process: str, path: str, child: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.probe(process, path) != 200:
            assert child.poll() is None and time.monotonic() < deadline, (self.folder / f"{process}.log").read_text()
            time.sleep(0.1)

    def probe(self, process: str, path: str) -> int:
        """The status that it is answered with; 0 where nobody listens."""
        try:
            with OPENER.open(f"http://127.0.0.1:{self.ports[process]}{path}", timeout=START_TIMEOUT_S) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    assert shutil.which("etcd"), "these tests need the real etcd: install Debian's etcd-server so that `etcd` is on the PATH"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    checkpoint.write(tmp_path / "model", 0, num_hidden_layers=2, **sizes)
    write_certificates(tmp_path / "tls", days=1, hosts=("127.0.0.1",))
    (tmp_path / "api-key").write_text(make_key(tmp_path / "keys.json"))
    return Machine(
        tmp_path, {name: free_port() for name in ("2379", "2380", "2381", "8000", "9000", "9001", "9002", "scheduler", "worker", "edge")}
    )


def make_key(file: Path) -> str:
    command = [sys.executable, "-m", "cli.main", "keys", "create", f"--file={file}", "--tenant=test"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("values", "refusal"), [({}, ""), (GUARDED, "refusal: ok\n")], ids=["default", "mutual TLS and keys"])
def test_the_chart_makes_a_cluster_that_passes_its_own_test(machine: Machine, values: Values, refusal: str) -> None:
    manifests = render(values)
    with ExitStack() as stack:
        for process, pod in PODS.items():
            stack.enter_context(machine.running(process, pod_specs(manifests)[pod]["containers"][0]))
        (job,) = of_kind(manifests, "Job")
        arguments = [machine.move("test", argument) for argument in job["spec"]["template"]["spec"]["containers"][0]["args"]]
        command = [sys.executable, str(CHART / "files/cluster_test.py"), *arguments]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert re.fullmatch(refusal + r"models: ossia-nano\nchat: \d+ tokens\nstream: \d+ chunks\n", ended.stdout)
