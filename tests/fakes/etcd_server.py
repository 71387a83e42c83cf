"""A real etcd on free ports: it can be killed, stopped, restarted on the same ports, and emptied."""

import json
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fakes.free_port import free_port

START_TIMEOUT_S = 120.0


class EtcdServer:
    """One member. `endpoint` is where clients find it. With `tls` (certificate, key, authority) it takes clients by mutual TLS only."""

    def __init__(self, name: str, folder: Path, tls: tuple[Path, Path, Path] | None = None) -> None:
        self.name = name
        self.cluster = ""  # all members as name=peer_url, comma separated; set before the first start
        self.endpoint = f"127.0.0.1:{free_port()}"
        self.peer_url = f"http://127.0.0.1:{free_port()}"
        self._metrics_url = f"http://127.0.0.1:{free_port()}"
        self._tls = tls
        self._data_dir = folder / name
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<etcd {self.name} at {self.endpoint}, {'up' if self._process else 'down'}>"

    def spawn(self) -> None:
        """Starts the process without waiting for it."""
        binary = shutil.which("etcd")
        if binary is None:
            raise RuntimeError("these tests need the real etcd: install Debian's etcd-server so that `etcd` is on the PATH")
        client_url = f"{'https' if self._tls else 'http'}://{self.endpoint}"
        flags = {
            "name": self.name,
            "data-dir": str(self._data_dir),
            "listen-client-urls": client_url,
            "advertise-client-urls": client_url,
            "listen-metrics-urls": self._metrics_url,
            "listen-peer-urls": self.peer_url,
            "initial-advertise-peer-urls": self.peer_url,
            "initial-cluster": self.cluster,
            "log-level": "warn",
        }
        if self._tls:
            flags |= dict(
                zip(("cert-file", "key-file", "trusted-ca-file"), map(str, self._tls), strict=True), **{"client-cert-auth": "true"}
            )
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([binary, *(f"--{key}={value}" for key, value in flags.items())], stdout=log, stderr=log)

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_healthy():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"etcd did not start; its log:\n{self._log.read_text()}")
            time.sleep(0.05)

    def start(self) -> None:
        self.spawn()
        self.wait_healthy()

    def kill(self) -> None:
        """SIGKILL: nothing is flushed and nobody is told."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        """Deletes all data of a member that is down."""
        assert self._process is None, "kill it first"
        shutil.rmtree(self._data_dir)

    def stop(self) -> None:
        """The process stands still, its connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._metrics_url}/health", timeout=START_TIMEOUT_S) as reply:
                return bool(json.load(reply)["health"] == "true")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


@contextmanager
def etcd_cluster(folder: Path, num_members: int, tls: tuple[Path, Path, Path] | None = None) -> Iterator[list[EtcdServer]]:
    """Members that know each other, healthy on entry and dead on exit."""
    members = [EtcdServer(f"etcd{index}", folder, tls) for index in range(num_members)]
    try:
        for member in members:
            member.cluster = ",".join(f"{other.name}={other.peer_url}" for other in members)
            member.spawn()
        for member in members:
            member.wait_healthy()
        yield members
    finally:
        for member in members:
            member.kill()
