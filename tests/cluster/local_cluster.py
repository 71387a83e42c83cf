"""A whole cluster of real processes, as `ossia up` starts it, for tests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from cli.certificates import open_identity, tls_flags, write_certificates
from protos.ossia.v1 import scheduler_pb2, scheduler_pb2_grpc
from services.tls import name_of

ROOT = Path(__file__).parent.parent.parent
START_TIMEOUT_S, STOP_TIMEOUT_S, SETTLE_TIMEOUT_S = 300.0, 180.0, 120.0


class LocalCluster:
    """Runs while inside. Takes free ports; `url` is the REST door, `grpc` the gRPC door.

    With OSSIA_TEST_TLS=1 in the environment, or with `tls`, its processes speak mutual TLS.
    """

    def __init__(self, home: Path, *flags: str, tls: bool | None = None) -> None:
        self.home = home
        self.tls_dir = home / "tls" if (os.environ.get("OSSIA_TEST_TLS") == "1" if tls is None else tls) else None
        with_tls = ("--tls-dir", str(self.tls_dir)) if self.tls_dir else ()
        self._argv = [sys.executable, "-m", "cli.main", "up", "--port", "0", "--grpc-port", "0", *with_tls, *flags]
        self.url = ""
        self.grpc = ""

    def __repr__(self) -> str:
        return f"LocalCluster({self.url}, {self.state_path})"

    def __enter__(self) -> Self:
        environment = {**os.environ, "OSSIA_HOME": str(self.home), "COLUMNS": "200"}
        self.log_path = self.home / "up.log"
        if self.tls_dir:
            write_certificates(self.tls_dir, days=1)
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(self._argv, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: "READY" in self.said or self.process.poll() is not None, START_TIMEOUT_S, self)
            assert self.process.poll() is None, self.said
        except BaseException:
            self._stop()
            raise
        self.url, self.grpc = f"http://{self.state['edge']['rest']}", self.state["edge"]["grpc"]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    @property
    def said(self) -> str:
        """What the command printed so far."""
        return self.log_path.read_text()

    @property
    def state_path(self) -> Path:
        return self.home / "clusters" / str(self.process.pid) / "state.json"

    @property
    def state(self) -> dict[str, dict[str, str]]:
        """Every process's id and addresses."""
        state: dict[str, dict[str, str]] = json.loads(self.state_path.read_text())
        return state

    def log_lines(self, name: str) -> list[dict[str, Any]]:
        """What a process has logged so far, without the line that it is writing."""
        written, _, _ = (self.state_path.parent / f"{name}.log").read_text().rpartition("\n")
        return [json.loads(line) for line in written.splitlines()]

    def wait_for_line(self, words: str) -> None:
        """Until the command has printed it; the state is written before."""
        wait_until(lambda: words in self.said, SETTLE_TIMEOUT_S, self)

    def kill(self, name: str) -> int:
        """kill -9 of one process; returns the id that it had."""
        pid = int(self.state[name]["pid"])
        os.kill(pid, signal.SIGKILL)
        return pid

    def status(self) -> scheduler_pb2.SchedulerStatus:
        address = self.state["scheduler"]["grpc"]
        if identity := open_identity(self.tls_dir, "client"):
            name = (("grpc.ssl_target_name_override", name_of("scheduler")),)
            opened = grpc.secure_channel(address, identity.channel_credentials(), options=name)
        else:
            opened = grpc.insecure_channel(address)
        with opened as channel:
            return scheduler_pb2_grpc.SchedulerStub(channel).Status(scheduler_pb2.StatusRequest(), timeout=60)

    def identity_flags(self, role: str) -> list[str]:
        """For one more process of this cluster."""
        return tls_flags(self.tls_dir, role) if self.tls_dir else []

    def is_idle(self) -> bool:
        """No group holds a sequence or a block."""
        groups = self.status().groups
        return bool(groups) and all(
            not group.num_running
            and not group.num_waiting
            and group.num_free_full_blocks == group.num_full_blocks
            and group.num_free_window_blocks == group.num_window_blocks
            for group in groups
        )


def wait_until(holds: Callable[[], bool], timeout_s: float, subject: object = "") -> None:
    """Polls until it holds; the time-out is generous because it only ends tests that have failed."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"it did not come to hold within {timeout_s} s: {subject}"
        time.sleep(0.05)
