"""A reader that does not read holds up its own stream only, and gets everything in order, in few large chunks, when it does."""

import asyncio
import json
import socket

import pytest

from edge.rest import server
from edge.rest.server import bind
from tests.edge.scripted_scheduler import MODEL, PATIENCE_S, Script, stand

WORDS = " ".join(map(str, range(20_000)))  # two megabytes of events, more than the sockets take
SOCKET_BYTES = 2**14  # of either side's buffer: the kernel's own grow, on some machines beyond all that is sent
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 250_000}


def bind_narrow(listen: str) -> socket.socket:
    listener = bind(listen)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    return listener


async def test_a_slow_reader_pauses_its_own_stream_only_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "bind", bind_narrow)
    async with stand(Script(f"<|channel|>final<|message|>{WORDS}<|return|>", chunk=4), max_model_len=300_000) as it:
        host, _, port = it.rest.rpartition(":")
        with socket.socket() as narrow:
            narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
            narrow.setblocking(False)
            await asyncio.get_running_loop().sock_connect(narrow, (host, int(port)))
            reader, writer = await asyncio.open_connection(sock=narrow.dup(), limit=SOCKET_BYTES)
        body = json.dumps(BODY).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await reader.readuntil(b"\r\n\r\n")  # and then nothing, until others are done
        async with it.http() as http:
            it.scheduler.script = Script()
            for _ in range(5):
                assert (await http.post("/v1/chat/completions", json=BODY)).text.endswith("data: [DONE]\n\n")
        assert it.edge.core.num_open == 1, "the slow one is still open"
        raw = await asyncio.wait_for(reader.read(-1), PATIENCE_S)
        writer.close()
        await writer.wait_closed()
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in raw.split(b"\n") if line.startswith(b"data: {")]
    texts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(texts) == WORDS and max(map(len, texts)) > 1000, "what had gathered came together"
