"""Random schemas and tool sets asked of a model whose weights are random: only the grammar can make its output right.

As a program it asks many and counts: `python -m tests.cluster.random_demands --requests 500`. Requests go to the scheduler, token ids in
and out, because only there may control tokens be made likelier: a random model would take a hundred thousand tokens to end a thought.
"""

from __future__ import annotations  # gRPC's generics exist in its type stubs only

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from jsonschema import Draft202012Validator

from cli.checkpoint import write
from edge.conversation.choice import Choice, ChoiceOptions
from edge.conversation.constraints import build_constraint
from edge.conversation.harmony_render import HarmonyRenderer
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from protos.ossia.v1 import scheduler_pb2 as scheduler
from protos.ossia.v1 import scheduler_pb2_grpc
from services.vocabulary import CALL, END, RETURN, load_vocabulary
from tests.cluster.local_cluster import LocalCluster

MODEL = "random"
MAX_TOKENS = 1500
NUM_AT_ONCE = 16
SIZES = {"num_hidden_layers": 2, "num_local_experts": 4, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
FORMATS = ("date", "ipv4", "uuid", "time")
CHOICE = inference.ToolChoice
V = load_vocabulary()
# What ends a thought, a string, a list or a number; else most of the vocabulary goes on and on.
ENDING = {END: 12.0, CALL: 12.0, RETURN: 12.0} | {V.encode(text)[0]: 9.0 for text in ('"', '",', '"}', "}", "]", ",", ":", '":', '"]')}


class SchemaMaker:
    """Schemas whose values are bounded, from one source of chance."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def make_object(self, depth: int = 3) -> dict[str, Any]:
        names = self._chance.sample(["city", "n", "on", "items", "x-y", "née", "kind", "a b"], self._chance.randint(0, 4))
        properties = {name: self._make(depth - 1) for name in names}
        required = [name for name in names if self._chance.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def _make(self, depth: int) -> dict[str, Any]:
        chance = self._chance
        leaves = (self._make_string, self._make_integer, self._make_plain, self._make_choice)
        if depth <= 0 or chance.random() < 0.5:
            return chance.choice(leaves)()
        kind = chance.randrange(4)
        if kind == 0:
            return self.make_object(depth)
        if kind == 1:
            least = chance.randint(0, 2)
            return {"type": "array", "items": self._make(depth - 1), "minItems": least, "maxItems": least + chance.randint(0, 3)}
        if kind == 2:
            return {"anyOf": [self._make(depth - 1) for _ in range(chance.randint(2, 3))]}
        prefix = [self._make(0) for _ in range(chance.randint(1, 3))]
        return {"type": "array", "prefixItems": prefix, "items": False, "minItems": len(prefix)}

    def _make_string(self) -> dict[str, Any]:
        kind = self._chance.randrange(3)
        if kind == 0:
            return {"type": "string", "format": self._chance.choice(FORMATS)}
        if kind == 1:
            return {
                "type": "string",
                "pattern": self._chance.choice(["^[a-z]{1,8}$", r"^\d{3}-\d{2}$", "^(red|green)+x?$", "^[A-F0-9]{4}$"]),
            }
        return {"type": "string", "minLength": self._chance.randint(0, 3), "maxLength": self._chance.randint(3, 12)}

    def _make_integer(self) -> dict[str, Any]:
        low = self._chance.randint(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + self._chance.randint(0, 5000)}

    def _make_plain(self) -> dict[str, Any]:
        return {"type": self._chance.choice(["boolean", "null", ["boolean", "null"]])}

    def _make_choice(self) -> dict[str, Any]:
        values: list[Any] = ["red", 'a "quote"', 7, -1.5, True, None, {"k": [1, 2]}, "日本"]
        return self._chance.choice(
            [{"enum": self._chance.sample(values, self._chance.randint(1, 5))}, {"const": self._chance.choice(values)}]
        )


def make_request(seed: int) -> inference.ChatRequest:
    """One demand: a format, tools, or both, forced or free, one call or several."""
    chance = random.Random(seed)
    maker = SchemaMaker(chance)
    request = inference.ChatRequest(
        messages=[inference.Message(role=inference.ROLE_USER, content=[inference.ContentPart(text=f"Question {seed}")])],
        reasoning_effort=inference.REASONING_EFFORT_LOW,
        conversation_date="2025-01-02",
    )
    kind = ("format", "required", "named", "auto", "both")[seed % 5]
    if kind in ("format", "both"):
        request.response_format.json_schema.name = "answer"
        request.response_format.json_schema.schema = json.dumps(maker.make_object())
    if kind != "format":
        for at in range(chance.randint(1, 5)):
            request.tools.add(name=f"tool_{at}" + "_x" * chance.randint(0, 5), parameters_json_schema=json.dumps(maker.make_object()))
        request.parallel_tool_calls = chance.random() < 0.5
    if kind == "required":
        request.tool_choice.mode = CHOICE.MODE_REQUIRED
    if kind == "named":
        request.tool_choice.mode, request.tool_choice.name = CHOICE.MODE_NAMED, chance.choice(request.tools).name
    return request


@dataclass
class Tally:
    """What came of the demands so far."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def note(self, seed: int, request: inference.ChatRequest, events: Iterable[inference.ChatEvent]) -> None:
        answer, calls, reason = read_events(events)
        self.counts["requests"] += 1
        self.counts["tokens"] += sum(len(event.choice_finished.token_ids) for event in events)
        self.counts["calls"] += len(calls)
        self.counts["turns with several calls"] += len(calls) > 1
        for fault in find_faults(request, answer, calls, reason):
            self.faults.append(f"{seed}: {fault}")


def read_events(events: Iterable[inference.ChatEvent]) -> tuple[str, list[tuple[str, str]], int]:
    """Final text, calls and finish reason of one choice."""
    answer, calls, reason = "", list[tuple[str, str]](), 0
    for event in events:
        if event.HasField("channel_delta") and event.channel_delta.channel == inference.CHANNEL_FINAL:
            answer += event.channel_delta.text
        elif event.HasField("tool_call_delta"):
            delta = event.tool_call_delta
            if delta.id:
                calls.append((delta.name, ""))
            calls[delta.call] = (calls[delta.call][0], calls[delta.call][1] + delta.arguments)
        elif event.HasField("choice_finished"):
            reason = event.choice_finished.reason
    return answer, calls, reason


def find_faults(request: inference.ChatRequest, answer: str, calls: list[tuple[str, str]], reason: int) -> list[str]:
    """What of the output is not as demanded."""
    schemas = {tool.name: json.loads(tool.parameters_json_schema) for tool in request.tools}
    faults = [f"{name} was never offered" for name, _ in calls if name not in schemas]
    faults += [f"{name}: {fault}" for name, arguments in calls if name in schemas for fault in check_json(arguments, schemas[name])]
    mode = request.tool_choice.mode
    if mode in (CHOICE.MODE_REQUIRED, CHOICE.MODE_NAMED) and not calls:
        faults.append("a call was required and none was made")
    if mode == CHOICE.MODE_NAMED and {name for name, _ in calls} - {request.tool_choice.name}:
        faults.append(f"{request.tool_choice.name} was named and another one called")
    if request.HasField("parallel_tool_calls") and not request.parallel_tool_calls and len(calls) > 1:
        faults.append("several calls where one was allowed")
    if not calls and request.response_format.HasField("json_schema"):
        faults += check_json(answer, json.loads(request.response_format.json_schema.schema))
    expected = sampling.FINISH_REASON_TOOL_CALLS if calls else sampling.FINISH_REASON_STOP
    return faults if reason == expected else [*faults, f"it ended with {sampling.FinishReason.Name(reason)}"]  # type: ignore[arg-type]


def check_json(text: str, schema: dict[str, Any]) -> list[str]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return [f"no JSON ({error}): {text[:80]!r}"]
    checker = Draft202012Validator.FORMAT_CHECKER
    return [f"{error.message[:120]}" for error in Draft202012Validator(schema, format_checker=checker).iter_errors(value)]


async def ask(stub: scheduler_pb2_grpc.SchedulerAsyncStub, seed: int, tally: Tally) -> None:
    request = make_request(seed)
    constraint = build_constraint(request)
    assert constraint is not None
    params = sampling.SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=seed, logit_bias=ENDING, constraint=constraint)
    prompt = HarmonyRenderer(V).render(request)
    generate = scheduler.GenerateRequest(request_id=f"demand-{seed}", model=MODEL, prompt_token_ids=prompt.token_ids, sampling=params, n=1)
    choice = Choice(0, V, ChoiceOptions(has_tools=bool(request.tools)))
    events: list[inference.ChatEvent] = []
    async for delta in stub.Generate(generate):
        events += choice.feed(delta.token_ids)
        if delta.HasField("finished"):
            events += choice.finish(delta.finished.reason)
            if delta.finished.reason == sampling.FINISH_REASON_ERROR:
                tally.faults.append(f"{seed}: {delta.finished.error.message}")
    if choice.parser.num_malformed:
        tally.faults.append(f"{seed}: the turn is malformed")
    tally.note(seed, request, events)


async def ask_all(address: str, seeds: Iterable[int]) -> Tally:
    tally, slots = Tally(), asyncio.Semaphore(NUM_AT_ONCE)

    async def ask_one(stub: scheduler_pb2_grpc.SchedulerAsyncStub, seed: int) -> None:
        async with slots:
            await ask(stub, seed, tally)

    async with grpc.aio.insecure_channel(address) as channel, asyncio.TaskGroup() as tasks:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        for seed in seeds:
            tasks.create_task(ask_one(stub, seed))
    return tally


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--requests", type=int, default=500)
    num_requests = flags.parse_args().requests
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory) / MODEL, 3, head_dim=32, num_key_value_heads=1, **SIZES)
        home = Path(directory) / "home"
        home.mkdir()
        with LocalCluster(
            home, "--model", str(Path(directory) / MODEL), "--kv-cache-gib", "0.2", "--num-threads", "1", tls=False
        ) as cluster:
            start = time.monotonic()
            tally = asyncio.run(ask_all(cluster.state["scheduler"]["grpc"], range(num_requests)))
    print(f"{dict(tally.counts)} in {time.monotonic() - start:.0f} s; {len(tally.faults)} faults", *tally.faults, sep="\n")


if __name__ == "__main__":
    main()
