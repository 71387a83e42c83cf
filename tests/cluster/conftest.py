"""Clusters that the tests of this folder share, each started once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.checkpoint import write
from tests.cluster.local_cluster import LocalCluster

# An answer of a minute at least, whose middle outlasts every pause; `HELLO_FAR` asks for it.
FAR = " ".join(str(number) for number in range(10_000))
HELLO_FAR: dict[str, Any] = {"messages": [{"role": "user", "content": "Count far"}], "max_tokens": 100_000}
REPLY = "<|channel|>analysis<|message|>Let me count.<|end|><|start|>assistant<|channel|>final<|message|>" + " ".join(
    str(number) for number in range(400)
)
SCRIPT = f"""
rules:
  - contains: ["weather"]
    reply: '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{{"city": "Oslo"}}<|call|>'
  - contains: ["Count far"]
    reply: "<|channel|>final<|message|>{FAR}"
default: "{REPLY}"
"""


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "script.yaml"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the real vocabulary; small in everything else."""
    directory = tmp_path_factory.mktemp("model") / "random"
    write(directory, 7, num_hidden_layers=3, num_local_experts=6, hidden_size=32, intermediate_size=64, num_attention_heads=4, head_dim=32)
    return directory


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory, script: Path) -> Iterator[LocalCluster]:
    """One group whose reply takes a second, so that there is a middle to break into."""
    with LocalCluster(tmp_path_factory.mktemp("home"), "--backend", "scripted", "--script", str(script), "--step-ms", "2") as cluster:
        yield cluster


@pytest.fixture(scope="module", params=[1, 2], ids=["one group", "two groups"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[LocalCluster]:
    """A real model, in one group and in two."""
    flags = ("--model", str(checkpoint), "--groups", str(request.param), "--kv-cache-gib", "0.05", "--num-threads", "1")
    with LocalCluster(tmp_path_factory.mktemp("home"), *flags) as cluster:
        yield cluster
