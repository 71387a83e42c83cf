"""A wire that can be cut, or slow to come about: forwards TCP connections to one target until told not to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.fakes.free_port import free_port


class TcpProxy:
    """`address` leads to `target`, for each connection after `delay_s` in which nothing passes. `cut` breaks every connection and closes
    the door; `mend` opens it again on the same port.
    """

    def __init__(self, target: str, delay_s: float = 0.0) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._delay_s = delay_s
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.address = f"127.0.0.1:{free_port()}"

    def __repr__(self) -> str:
        return f"<wire {self.address} to {self._host}:{self._port}, {'whole' if self._server else 'cut'}>"

    async def mend(self) -> None:
        host, _, port = self.address.rpartition(":")
        self._server = await asyncio.start_server(self._serve, host, int(port))

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in tuple(self._writers):
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        await asyncio.sleep(self._delay_s)
        try:
            there_reader, there_writer = await asyncio.open_connection(self._host, int(self._port))
        except OSError:
            self._writers.discard(writer)
            writer.close()
            return
        if writer.is_closing():  # it was cut meanwhile
            there_writer.close()
        await asyncio.gather(self._pump(reader, there_writer), self._pump(there_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # the other end, or `cut`
        finally:
            self._writers.discard(writer)
            writer.close()


@asynccontextmanager
async def tcp_proxy(target: str, delay_s: float = 0.0) -> AsyncIterator[TcpProxy]:
    proxy = TcpProxy(target, delay_s)
    await proxy.mend()
    try:
        yield proxy
    finally:
        await proxy.cut()
