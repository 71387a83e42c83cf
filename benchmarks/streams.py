"""Clients that stream chats without a pause, and what became of each stream."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from threading import Event

import httpx

READ_TIMEOUT_S = 60.0
PAUSE_AFTER_REFUSAL_S = 0.1  # a client that is told to come again does not come at once


@dataclass
class Tally:
    """Counts of streams. `open_now` are those that have begun and not ended."""

    num_finished: int = 0
    broken: list[str] = field(default_factory=list)  # why, for each that ended without its end
    refused: list[str] = field(default_factory=list)  # why, for each that never began
    open_now: set[int] = field(default_factory=set)  # numbers of streams
    ended: dict[int, bool] = field(default_factory=dict)  # by number: whether it came to its end

    def close(self, number: int, failure: str | None) -> None:
        self.open_now.discard(number)
        self.ended[number] = failure is None
        if failure is None:
            self.num_finished += 1
        else:
            self.broken.append(failure)


@asynccontextmanager
async def streaming(choose_url: Callable[[], str], bodies: Sequence[dict[str, object]], num_clients: int) -> AsyncIterator[Tally]:
    """Inside, `num_clients` clients stream one chat after the other, each against the door that `choose_url` gives; leaving waits for the
    streams that are open.
    """
    tally, stop = Tally(), asyncio.Event()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=READ_TIMEOUT_S, limits=limits) as client, asyncio.TaskGroup() as tasks:
        for number in range(num_clients):
            tasks.create_task(_stream_on(client, choose_url, bodies, range(number, 10**9, num_clients), tally, stop))
        try:
            yield tally
        finally:
            stop.set()


@contextmanager
def streaming_in_thread(choose_url: Callable[[], str], bodies: Sequence[dict[str, object]], num_clients: int) -> Iterator[Tally]:
    """The same for a caller without an event loop."""
    begun: Future[Tally] = Future()
    stop = Event()

    async def stream() -> None:
        async with streaming(choose_url, bodies, num_clients) as tally:
            begun.set_result(tally)
            await asyncio.to_thread(stop.wait)

    with ThreadPoolExecutor(1, thread_name_prefix="streams") as thread:
        streams = thread.submit(asyncio.run, stream())
        try:
            yield begun.result()
        finally:
            stop.set()
            streams.result()


async def _stream_on(
    client: httpx.AsyncClient,
    choose_url: Callable[[], str],
    bodies: Sequence[dict[str, object]],
    numbers: range,
    tally: Tally,
    stop: asyncio.Event,
) -> None:
    for number in numbers:
        if stop.is_set():
            return
        num_refused = len(tally.refused)
        await _stream_once(client, choose_url(), {**bodies[number % len(bodies)], "stream": True}, number, tally)
        if len(tally.refused) > num_refused:
            await asyncio.sleep(PAUSE_AFTER_REFUSAL_S)


async def _stream_once(client: httpx.AsyncClient, url: str, body: dict[str, object], number: int, tally: Tally) -> None:
    has_begun, failure = False, "the stream ended without [DONE]"
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                tally.refused.append(str(answer.status_code))
                return
            async for line in answer.aiter_lines():
                if not has_begun:
                    has_begun = True
                    tally.open_now.add(number)
                if line == "data: [DONE]":
                    tally.close(number, None)
                    return
                if line.startswith("data: {") and "error" in (event := json.loads(line.removeprefix("data: "))):
                    failure = str(event["error"]["code"])
                    break
    except httpx.HTTPError as error:
        failure = type(error).__name__
    if has_begun:
        tally.close(number, failure)
    else:
        tally.refused.append(failure)
