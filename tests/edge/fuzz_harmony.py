"""Random token streams through parser and choice, in many chunkings: nothing raises, no token is lost, no control token is shown.

    python -m tests.edge.fuzz_harmony --streams 1000000 --processes 2

Short streams are cut in every way there is, longer ones whole, token by token, and at random.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations, repeat
from typing import NamedTuple

from edge.conversation.choice import Choice, ChoiceOptions
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from services.vocabulary import CONTROL_NAMES, FIRST_CONTROL_ID, VOCAB_SIZE, load_vocabulary

V = load_vocabulary()
WORDS = ("assistant", "analysis", "commentary", "final", " to", "=", "functions", ".f", "json", " ", "user", "Hi", "\n", "{}", "STOP")
PARTS_OF_CHARACTERS = V.encode("\U0001f9ff\U0001f468‍\U0001f469")
ALPHABET = [*CONTROL_NAMES, *(V.encode(word)[0] for word in WORDS), *PARTS_OF_CHARACTERS, VOCAB_SIZE, VOCAB_SIZE + 7, 200_013]
# Pieces as a model writes them, so that streams come deep into the format and break there.
PIECES = [
    V.encode_harmony(text)
    for text in (
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
        " to=functions.f<|channel|>commentary<|message|>",
        "<|end|><|start|>assistant",
        "{}<|call|>",
        "<|return|>",
    )
]
MAX_SHORT = 6  # tokens of a stream that is cut in every way
CHUNK = 2000  # streams of one task


class Reading(NamedTuple):
    """What a stream became, however it was cut."""

    messages: tuple[tuple[str, str], ...]  # channel or function, and text
    reason: int
    counts: tuple[int, ...]
    num_malformed: int


def make_stream(chance: random.Random) -> list[int]:
    token_ids: list[int] = []
    length = chance.randint(0, MAX_SHORT if chance.random() < 0.1 else 16)
    while len(token_ids) < length:
        kind = chance.random()
        if kind < 0.25:
            token_ids += chance.choice(PIECES)
        elif kind < 0.85:
            token_ids.append(chance.choice(ALPHABET))
        else:
            token_ids.append(chance.randrange(VOCAB_SIZE))
    return token_ids


def cut_stream(token_ids: Sequence[int], chance: random.Random) -> Iterator[tuple[int, ...]]:
    """Where to cut: every set of places for a short stream, some for a longer one."""
    places = range(1, len(token_ids))
    if len(token_ids) <= MAX_SHORT:
        for number in range(len(token_ids)):
            yield from combinations(places, number)
        return
    yield from ((), tuple(places), tuple(sorted(chance.sample(places, chance.randint(1, len(places))))))


def read(token_ids: Sequence[int], cuts: Sequence[int], options: ChoiceOptions) -> Reading:
    choice = Choice(0, V, options)
    events: list[inference.ChatEvent] = []
    for start, stop in zip((0, *cuts), (*cuts, len(token_ids)), strict=True):
        events += choice.feed(token_ids[start:stop])
    events += choice.finish(sampling.FINISH_REASON_STOP)
    counts = tuple(choice.parser.num_tokens.values())
    assert sum(counts) == len(choice.token_ids), "a token was lost"
    assert choice.is_finished or list(choice.token_ids) == list(token_ids)
    return Reading(tuple(join(events)), events[-1].choice_finished.reason, counts, choice.parser.num_malformed)


def join(events: Sequence[inference.ChatEvent]) -> list[tuple[str, str]]:
    """Deltas of one message joined; calls keep their places."""
    messages: list[tuple[str, str]] = []
    for event in events:
        if event.HasField("channel_delta"):
            name, text = str(event.channel_delta.channel), event.channel_delta.text
        elif event.HasField("tool_call_delta"):
            name, text = f"call {event.tool_call_delta.call}", event.tool_call_delta.name + "(" * bool(event.tool_call_delta.id)
            text += event.tool_call_delta.arguments
        else:
            continue
        if messages and messages[-1][0] == name:
            messages[-1] = (name, messages[-1][1] + text)
        else:
            messages.append((name, text))
    return messages


def check_stream(token_ids: Sequence[int], chance: random.Random) -> int:
    """Reads the stream in every cut that is tried; returns how many. Raises AssertionError."""
    options = ChoiceOptions(stop=("STOP",) if chance.random() < 0.3 else (), has_tools=chance.random() < 0.7)
    expected, num_cuts = None, 0
    for cuts in cut_stream(token_ids, chance):
        reading = read(token_ids, cuts, options)
        expected = expected or reading
        num_cuts += 1
        assert reading == expected, f"{list(token_ids)} reads otherwise when it is cut at {cuts}: {reading} is not {expected}"
    if expected and not any(b"<|" in V.token_bytes(one) or b"|>" in V.token_bytes(one) for one in token_ids if one < FIRST_CONTROL_ID):
        shown = "".join(text for _, text in expected.messages)
        assert not any(name in shown for name in CONTROL_NAMES.values()), f"{list(token_ids)} shows a control token: {shown!r}"
        assert "<|reserved_" not in shown
    return num_cuts


def run(seed: int, num_streams: int) -> tuple[int, int]:
    """(streams, readings)"""
    chance = random.Random(seed)
    return num_streams, sum(check_stream(make_stream(chance), chance) for _ in range(num_streams))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--streams", type=int, default=1_000_000)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--processes", type=int, default=1)
    asked = flags.parse_args()
    start, num_tasks = time.monotonic(), -(-asked.streams // CHUNK)
    with ProcessPoolExecutor(asked.processes) as pool:
        done = list(pool.map(run, range(asked.seed, asked.seed + num_tasks), repeat(CHUNK)))
    num_streams, num_readings = (sum(column) for column in zip(*done, strict=True))
    print(f"{num_streams:,} streams read {num_readings:,} times in {time.monotonic() - start:.0f} s: nothing raised, lost or shown")


if __name__ == "__main__":
    main()
