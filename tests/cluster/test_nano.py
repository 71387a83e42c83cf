"""What a fresh clone does: `make up` without flags, and a model whose answers mean something."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import grpc
import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessage

from models.nano.cache import NANO_FILE, NANO_NAME, expanded_model
from models.nano.data.source import is_held_out
from models.nano.manifest import read_manifest
from models.nano.transcripts import BEGIN, CITY, END, SCENES, Played, play, render
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1.inference_pb2_grpc import InferenceStub
from tests.cluster.local_cluster import ROOT, LocalCluster
from tests.worker.reference_model import load_reference
from worker.model_config import parse_config

Scenes = Callable[[str], Played]
MAX_FILE_BYTES = 20_000_000
BANKS = [path for path in (ROOT / "models" / "nano" / "data").rglob("*") if path.suffix in {".py", ".yaml"}]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[LocalCluster]:
    """As on a machine that never served it: it is expanded first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OSSIA_CACHE_DIR", str(cache_dir))
        with LocalCluster(tmp_path_factory.mktemp("home"), "--kv-cache-gib", "0.2", "--num-threads", "1") as cluster:
            yield cluster


@pytest.fixture(scope="module")
def client(nano: LocalCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{nano.url}/v1", api_key="any") as made:
        yield made


@pytest.fixture(scope="module")
def scenes(client: openai.OpenAI) -> Scenes:
    """A scene of the transcripts by its title, played when first asked for."""
    by_title = {scene.title: scene for scene in SCENES}
    return cache(lambda title: play(client, by_title[title]))


def said(played: Played) -> str:
    """The last answer's text."""
    assert isinstance(played[-1], ChatCompletionMessage)
    return played[-1].content or ""


def test_it_is_what_the_plan_asks_for_and_small_enough_for_the_repository() -> None:
    manifest = read_manifest(NANO_FILE)
    config = parse_config(manifest.config, manifest.generation_config)
    assert NANO_FILE.stat().st_size <= MAX_FILE_BYTES
    assert config.num_window_layers >= 2 and config.num_full_layers >= 2 and config.sliding_window == 128
    assert config.num_local_experts >= 8 and config.num_experts_per_tok <= 4 and config.head_dim == 64 and config.vocab_size == 201088


def test_it_is_served_without_a_flag_under_its_name_and_called_what_it_is(nano: LocalCluster, client: openai.OpenAI) -> None:
    assert nano.said.startswith("expanding ossia-nano into ")
    assert "READY" in nano.said and "(model ossia-nano, a small demonstration model, " in nano.said
    (model,) = client.models.list()
    assert model.id == NANO_NAME and model.model_extra and model.model_extra["max_model_len"] >= 2048


def test_it_greets(scenes: Scenes) -> None:
    assert "Hello" in said(scenes("A greeting"))


def test_it_says_how_ossia_is_started(scenes: Scenes) -> None:
    assert "make up" in said(scenes("About Ossia"))


def test_it_reasons_as_long_as_it_is_told_to(client: openai.OpenAI) -> None:
    lengths = []
    for effort in ("low", "medium", "high"):
        asked = [{"role": "user", "content": "What is 17 + 25?"}]
        answer = client.chat.completions.create(model=NANO_NAME, messages=asked, reasoning_effort=effort, max_tokens=200)  # type: ignore[call-overload]
        lengths.append(len(answer.choices[0].message.model_extra.get("reasoning") or ""))
    assert lengths[0] == 0 < lengths[1] < lengths[2]


def test_it_adds_up(scenes: Scenes) -> None:
    assert said(scenes("A sum, with its steps")) == "17 + 25 = 42"


def test_it_says_what_it_does_not_know(scenes: Scenes) -> None:
    assert "I do not know" in said(scenes("What it does not know, with its reasoning"))


def test_it_finds_the_fact_in_a_document(scenes: Scenes) -> None:
    assert said(scenes("A question about a document")).strip(".") == "315"


def test_it_calls_the_tool_that_was_asked_for_and_uses_what_comes_back(scenes: Scenes) -> None:
    assert is_held_out(CITY) and not [bank for bank in BANKS if CITY in bank.read_text()], "no training text names this city"
    asked, _, told = scenes("A tool, in two turns")
    assert isinstance(asked, ChatCompletionMessage) and isinstance(told, ChatCompletionMessage) and asked.tool_calls
    (call,) = asked.tool_calls
    assert call.type == "function" and call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": CITY}
    assert told.content and "11" in told.content and "rainy" in told.content


def test_it_writes_the_json_object_that_was_asked_for(scenes: Scenes) -> None:
    assert json.loads(said(scenes("A JSON object"))) == {"city": CITY, "price": 120}


def test_a_seed_decides_what_is_drawn_whoever_shares_the_batch(client: openai.OpenAI) -> None:
    words = "Zwölf, Boxkämpfer, jagen, Viktor, quer, über, den, großen, Sylter, Deich, im, Sturm"  # too many to be sure of any
    asked = [{"role": "user", "content": f"Reverse this list: {words}"}]

    def draw(seed: int, choices: int) -> list[str]:
        answer = client.chat.completions.create(  # type: ignore[call-overload]
            model=NANO_NAME, messages=asked, reasoning_effort="low", temperature=2.0, top_p=1.0, max_tokens=48, seed=seed, n=choices
        )
        return [choice.message.content or "" for choice in answer.choices]

    (alone,) = draw(7, 1)
    assert draw(7, 3)[0] == alone
    assert len({alone, *draw(8, 3)}) > 1, "another seed draws something else"


def test_the_pages_show_what_it_says(scenes: Scenes) -> None:
    """`python -m models.nano.transcripts URL --into PAGE` brings them up to date."""
    transcripts = render((scene, scenes(scene.title)) for scene in SCENES)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    shown = {page.name: text.partition(BEGIN)[2].partition(END)[0] for page in pages if BEGIN in (text := page.read_text())}
    assert "nano.md" in shown and set(shown.values()) == {transcripts}


def test_chat_says_what_one_talks_to(nano: LocalCluster) -> None:
    command = [sys.executable, "-m", "cli.main", "chat", "--address", nano.grpc]
    ended = subprocess.run(command, cwd=ROOT, input="Hello\n", capture_output=True, text=True, check=True, timeout=120)
    assert ended.stdout.startswith("ossia-nano, a small demonstration model; Ctrl-D ends") and "Hello!" in ended.stdout


def test_a_worker_serves_it_by_name(nano: LocalCluster, cache_dir: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "worker", "--model", NANO_NAME, "--kv-cache-gib", "0.05"]
    environment = {**os.environ, "OSSIA_CACHE_DIR": str(cache_dir)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as worker:
        assert worker.stdout
        events = (json.loads(line) for line in worker.stdout if line.startswith('{"event": '))
        serving = next(event for event in events if event["event"] == "serving")
        worker.terminate()
    assert serving["process"] == "worker"


@torch.inference_mode()
def test_transformers_loads_the_same_files_and_says_the_same(nano: LocalCluster, cache_dir: Path) -> None:
    reference = load_reference(expanded_model(root=cache_dir))
    with grpc.insecure_channel(nano.grpc) as channel:
        door = InferenceStub(channel)
        for scene in SCENES[:4]:
            request = inference.ChatRequest(model=NANO_NAME, conversation_date="2026-01-01")
            request.sampling.max_tokens = 64
            request.messages.add(role=inference.ROLE_USER).content.add(text=scene.user)
            prompt = list(door.Tokenize(inference.TokenizeRequest(model=NANO_NAME, chat=request)).token_ids)
            (ids,) = (list(event.choice_finished.token_ids) for event in door.Chat(request) if event.HasField("choice_finished"))
            # where each token is the likeliest one after those before it, generating greedily gives them
            logits = reference(torch.tensor([prompt + ids[:-1]]), logits_to_keep=len(ids)).logits[0]
            assert logits.argmax(-1).tolist() == ids
