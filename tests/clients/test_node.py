"""Node: OpenAI's client and a gRPC one, as the examples use them."""

import asyncio
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protos.ossia.v1 import sampling_pb2 as sampling
from tests.clients.conftest import ANSWER, MODEL, PLACE, SUNNY
from tests.clients.test_openai_python import heal_after
from tests.cluster.local_cluster import ROOT, LocalCluster
from tests.edge import scripted_scheduler as fake

EXAMPLES = ROOT / "examples" / "node"


def command(script: str, *arguments: str) -> list[str]:
    node = shutil.which("node")
    assert node, "tests need Node: run tests/install_system_packages.sh"
    assert (EXAMPLES / "node_modules").is_dir(), "tests need the examples' packages: run make setup"
    return [node, str(EXAMPLES / script), *arguments]


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(command(script, *arguments), capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_openais_node_client_does_all_that_an_application_does(cluster: LocalCluster) -> None:
    found = json.loads(run("tour.mjs", cluster.url, MODEL))
    assert (found["chat"], found["stream"], found["response"]) == (ANSWER, ANSWER, ANSWER) and found["usage"] > 0
    assert (found["tools"], found["toolArgument"]) == (SUNNY, "Oslo")
    assert found["parsed"] == found["parsedResponse"] == PLACE
    assert found["previous"] is True and found["models"] == [MODEL]
    assert found["events"][:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert found["events"][-1] == "response.completed" and "response.output_text.delta" in found["events"]
    assert found["error"] == [True, 404, "model_not_found", "model", True]


@pytest.mark.parametrize(("script", "door"), [("grpc_chat.mjs", "grpc"), ("openai_chat.mjs", "url")])
def test_the_examples_stream_an_answer(cluster: LocalCluster, script: str, door: str) -> None:
    assert run(script, getattr(cluster, door), MODEL, "Hello") == ANSWER


@pytest.mark.parametrize(("script", "door"), [("openai_chat.mjs", "url"), ("grpc_chat.mjs", "grpc")])
async def test_a_refused_request_is_sent_again(script: str, door: str) -> None:
    busy = sampling.Error(code=sampling.ERROR_CODE_OVERLOADED, message="busy", retry_after_s=1.0)
    async with fake.stand(fake.Script(error=busy, text="")) as it:
        heal_after(it, 1)
        begun = time.monotonic()
        asked = command(script, getattr(it, door), fake.MODEL, "Hi")
        process = await asyncio.create_subprocess_exec(*asked, stdout=asyncio.subprocess.PIPE)
        said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert said.decode().strip() == "Hello there." and len(it.scheduler.requests) == 2
    assert time.monotonic() - begun >= 0.95, "both were told to come back after a second"


@pytest.mark.parametrize(("script", "door"), [("grpc_chat.py", "grpc"), ("openai_chat.py", "url")])
def test_the_python_examples_stream_an_answer(cluster: LocalCluster, script: str, door: str) -> None:
    asked = [sys.executable, str(Path("examples") / "python" / script), getattr(cluster, door), MODEL, "Hello"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ANSWER), done.stderr
