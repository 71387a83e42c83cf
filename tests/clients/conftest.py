"""One scripted cluster for all clients: it calls a tool where there is one, answers in JSON where a schema asks, and else just answers."""

from collections.abc import Iterator

import pytest

from tests.cluster.local_cluster import LocalCluster

MODEL = "scripted"
ANSWER = "Hello to you, 1 2 3."
SUNNY = "It is sunny in Oslo."
PLACE = {"city": "Oslo", "degrees": 21.5}
THOUGHT = "<|channel|>analysis<|message|>A thought.<|end|><|start|>assistant<|channel|>"
SCRIPT = f"""
rules:
  - contains: ["<|start|>functions.get_weather to=assistant"]
    reply: "<|channel|>final<|message|>{SUNNY}<|return|>"
  - contains: ["type get_weather", "weather"]
    reply: '{THOUGHT}commentary to=functions.get_weather <|constrain|>json<|message|>{{"city": "Oslo"}}<|call|>'
  - contains: ["# Response Formats"]
    reply: '{THOUGHT}final<|message|>{{"city": "Oslo", "degrees": 21.5}}<|return|>'
default: "{THOUGHT}final<|message|>{ANSWER}<|return|>"
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    home = tmp_path_factory.mktemp("clients")
    script = home / "script.yaml"
    script.write_text(SCRIPT)
    with LocalCluster(home, "--backend", "scripted", "--script", str(script)) as running:
        yield running
