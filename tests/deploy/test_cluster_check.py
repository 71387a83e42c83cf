"""`helm test`'s program tells a cluster that works from one that does not."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.deploy.chart import CHART

KEY = "sk-ossia-test"
CHUNK = {"choices": [{"delta": {"content": "Hi"}, "finish_reason": None}]}
LAST = {"choices": [{"delta": {}, "finish_reason": "stop"}]}


@dataclass
class Door:
    """A REST door that answers what it is told to."""

    models: list[dict[str, str]] = field(default_factory=lambda: [{"id": "m"}])
    events: list[str] = field(default_factory=lambda: [json.dumps(CHUNK), json.dumps(LAST), "[DONE]"])
    usage: dict[str, int] = field(default_factory=lambda: {"completion_tokens": 2})
    wants_key: bool = False
    url: str = ""


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"data": door.models})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if body.get("stream"):
                self._send(200, "".join(f"data: {event}\n\n" for event in door.events).encode())
            else:
                self._answer({"choices": [LAST["choices"][0]], "usage": door.usage})

        def _answer(self, body: object) -> None:
            is_refused = door.wants_key and self.headers.get("authorization") != f"Bearer {KEY}"
            self._send(401 if is_refused else 200, json.dumps(body).encode())

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        door.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield door
        server.shutdown()
        thread.join()


def check(door: Door, *flags: str) -> tuple[int, str]:
    """The exit code, and what was said."""
    command = [sys.executable, str(CHART / "files/cluster_test.py"), door.url, *flags]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


def test_a_cluster_that_works_passes(door: Door) -> None:
    assert check(door) == (0, "models: m\nchat: 2 tokens\nstream: 2 chunks\n")


def test_a_guarded_cluster_refuses_and_then_passes_with_a_key(door: Door, tmp_path: Path) -> None:
    door.wants_key = True
    (tmp_path / "key").write_text(f"{KEY}\n")
    code, said = check(door, "--auth", "--key-file", str(tmp_path / "key"))
    assert code == 0 and said.startswith("refusal: ok\nmodels: m\n")
    assert check(door, "--auth")[0] == 0
    assert check(door) == (1, "FAILED: /v1/models was answered with 401: " + json.dumps({"data": door.models}) + "\n")


@pytest.mark.parametrize(
    ("fault", "flags", "why"),
    [
        ({}, ("--auth",), "a request without a key was answered with 200, not 401"),
        ({"models": []}, (), "no model is served: look at the workers' logs"),
        ({"usage": {"completion_tokens": 0}}, (), "the chat did not end well"),
        ({"events": [json.dumps(CHUNK)]}, (), "the stream broke off"),
        ({"events": [json.dumps(CHUNK), "[DONE]"]}, (), "the stream ended without a finish_reason"),
    ],
)
def test_a_cluster_that_does_not_work_fails(door: Door, fault: dict[str, object], flags: tuple[str, ...], why: str) -> None:
    for name, value in fault.items():
        setattr(door, name, value)
    code, said = check(door, *flags)
    assert code == 1 and f"FAILED: {why}" in said


def test_a_cluster_that_is_away_fails(door: Door) -> None:
    door.url = "http://127.0.0.1:9"
    assert check(door)[0] == 1
