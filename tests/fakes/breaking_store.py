"""A real HTTP server of files that breaks off, forgets how to resume, or lies, as a test wants it to."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class BreakingStore:
    """Serves `files` by path. `breaks_after` are the bytes that each next answer sends before it breaks off; then answers are whole."""

    files: dict[str, bytes]
    breaks_after: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # of the next answers, before any file is served
    has_ranges: bool = True
    url: str = ""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # path and headers, as they came

    @property
    def ranges(self) -> list[str]:
        """What was asked for, probes for the size aside."""
        return [headers.get("range", "all") for _, headers in self.requests if headers.get("range") != "bytes=0-0"]

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client has seen enough, or asked nothing
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        path = lines[0].split(" ")[1].lstrip("/")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
        self.requests.append((path, headers))
        is_probe = headers.get("range") == "bytes=0-0"
        status, body, extra = self._find(path, headers)
        sent = body
        if status in (200, 206) and not is_probe and self.breaks_after:
            sent = body[: self.breaks_after.pop(0)]
        fields = "".join(
            f"{name}: {value}\r\n" for name, value in {"content-length": str(len(body)), "connection": "close", **extra}.items()
        )
        writer.write(f"HTTP/1.1 {status} x\r\n{fields}\r\n".encode() + sent)
        await writer.drain()

    def _find(self, path: str, headers: Mapping[str, str]) -> tuple[int, bytes, dict[str, str]]:
        if self.statuses:
            return self.statuses.pop(0), b"", {}
        if path not in self.files:
            return 404, b"", {}
        content = self.files[path]
        if not self.has_ranges or "range" not in headers:
            return 200, content, {}
        first, _, last = headers["range"].removeprefix("bytes=").partition("-")
        start, end = int(first), int(last) + 1 if last else len(content)
        if start >= len(content):
            return 416, b"", {"content-range": f"bytes */{len(content)}"}
        return 206, content[start:end], {"content-range": f"bytes {start}-{min(end, len(content)) - 1}/{len(content)}"}


@asynccontextmanager
async def serve_files(files: Mapping[str, bytes]) -> AsyncIterator[BreakingStore]:
    store = BreakingStore(dict(files))
    server = await asyncio.start_server(store.answer, "127.0.0.1", 0)
    async with server:
        store.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield store
