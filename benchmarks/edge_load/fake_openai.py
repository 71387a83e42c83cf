"""A fake worker that speaks OpenAI's SSE, for proxies that expect one: `python -m benchmarks.edge_load.fake_openai PERIOD_MS`.

Every stream gets one token per period and as many as it asked for. Prints its address. As cheap as a server can be, so that the proxy
before it is what is measured.
"""

import asyncio
import json
import sys

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def encode(delta: dict[str, str], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "scripted", "choices": [choice]}
    return frame(b"data: " + json.dumps(chunk).encode() + b"\n\n")


def frame(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


ROLE, TOKEN, END = encode({"role": "assistant", "content": ""}), encode({"content": " 7"}), encode({}, "stop")
LAST = frame(b"data: [DONE]\n\n") + b"0\r\n\r\n"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, period_s: float) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line.partition(b":")[2]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
            num_tokens = json.loads(await reader.readexactly(length))["max_tokens"]
            writer.write(HEAD + ROLE)
            next_at = asyncio.get_running_loop().time()
            for _ in range(num_tokens):
                next_at += period_s
                await asyncio.sleep(next_at - asyncio.get_running_loop().time())
                writer.write(TOKEN)
            writer.write(END + LAST)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def main(period_s: float) -> None:
    server = await asyncio.start_server(lambda reader, writer: answer(reader, writer, period_s), "127.0.0.1", 0, backlog=2048)
    print("{}:{}".format(*server.sockets[0].getsockname()), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]) / 1000))
