"""The servers under load: our own processes as a cluster starts them, and litellm's proxy in an environment of its own."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ossia-benchmarks"
START_TIMEOUT_S = 120.0
HEADER = "<|channel|>final<|message|>"


# Quiet and without a download, as its manual advises for load; without a key, as it stands before a loopback only.
LITELLM_ENVIRONMENT = {
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}


@dataclass(frozen=True)
class Target:
    """A server to load at host:port. `pids` are the processes whose CPU counts: those that stand for the model are not among them."""

    name: str
    address: str
    pids: tuple[int, ...]

    def cpu_s(self) -> float:
        """CPU time that the counted processes have used, their threads and children included."""
        return sum(map(_cpu_s, self.pids))


@contextmanager
def ossia(step_ms: float, num_words: int, max_num_seqs: int = 64, header: str = HEADER) -> Iterator[Target]:
    """Worker, scheduler and edge as three processes. Without a `header` the first token is the first word, as text completions want it."""
    with scripted_worker(step_ms, num_words, max_num_seqs, header) as worker, _started("scheduler", "--groups", worker) as scheduler:
        listen = ("--rest-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0")
        with _started("edge", "--schedulers", scheduler[1]["grpc"], *listen) as edge:
            _wait_ready(f"http://{edge[1]['rest']}/readyz")
            yield Target("ossia", edge[1]["rest"], (edge[0], scheduler[0]))


@contextmanager
def scripted_worker(step_ms: float, num_words: int, max_num_seqs: int, header: str = HEADER) -> Iterator[str]:
    """A worker that says `num_words` words and takes `step_ms` for a step; gives its address."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.yaml"
        script.write_text(f'default: "{header}{" 7" * num_words}"\n')
        blocks = str(max_num_seqs * 81)
        sizes = ("--num-full-blocks", blocks, "--num-window-blocks", blocks, "--max-num-seqs", str(max_num_seqs), "--max-model-len", "4096")
        rules = ("--backend", "scripted", "--model", "scripted", "--script", str(script), "--step-ms", str(step_ms))
        with _started("worker", *rules, *sizes, "--max-batch-tokens", str(8192 + max_num_seqs)) as (_, said):
            yield said["grpc"]


@contextmanager
def litellm(period_ms: float) -> Iterator[Target]:
    """litellm's proxy, one process, logging off as its manual advises for load, before a fake worker."""
    with ExitStack() as stack:
        upstream = stack.enter_context(fake_openai(period_ms))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        parameters = {"model": "openai/scripted", "api_base": f"http://{upstream}/v1", "api_key": "none"}
        config = {"model_list": [{"model_name": "scripted", "litellm_params": parameters}], "litellm_settings": {"drop_params": True}}
        (folder / "config.yaml").write_text(json.dumps(config))
        port = _free_port()
        command = [str(install_litellm() / "bin" / "litellm"), "--config", str(folder / "config.yaml"), "--host", "127.0.0.1"]
        environment = {**os.environ, **LITELLM_ENVIRONMENT}
        process = stack.enter_context(_running([*command, "--port", str(port), "--num_workers", "1"], folder, env=environment))
        _wait_ready(f"http://127.0.0.1:{port}/health/liveliness")
        yield Target("litellm", f"127.0.0.1:{port}", (process.pid,))


@contextmanager
def fake_openai(period_ms: float) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.edge_load.fake_openai", str(period_ms)]
    with _running(command, ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()


def install_litellm() -> Path:
    """litellm's own environment, made on first use."""
    place = CACHE / "litellm"
    if not (place / "ready").exists():
        print(f"installing litellm into {place}", file=sys.stderr)
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([str(place / "bin" / "pip"), "install", "--quiet", "litellm[proxy]"], check=True)
        (place / "ready").touch()
    return place


@contextmanager
def _started(*argv: str) -> Iterator[tuple[int, dict[str, str]]]:
    """One of our processes, from its announcement on."""
    with _running([sys.executable, "-m", *argv], ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said: dict[str, str] = json.loads(line)
            if said["event"] == "serving":
                yield process.pid, said
                return
        raise RuntimeError(f"{argv[0]} did not start")


@contextmanager
def _running(command: list[str], folder: Path, **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    options.setdefault("stdout", subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(_cpu_s(int(child)) for child in children)


def _wait_ready(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError(f"nothing answered at {url}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
