"""Who may talk to whom over mutual TLS, and that certificates change under open streams."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from fastapi import FastAPI

from cli.certificates import open_identity, write_certificates
from edge.rest.server import serve_rest
from protos.ossia.v1 import scheduler_pb2 as pb
from protos.ossia.v1 import scheduler_pb2_grpc as rpc
from services.config import ConfigError, ProcessConfig, load_config
from services.errors import PermissionDenied, from_rpc_error
from services.grpc_channel import open_channel
from services.grpc_server import RunningServer, serve
from services.tls import Identity, load_identities, name_of, read_identity

SERVICE = "ossia.v1.Scheduler"


class Counting(rpc.SchedulerServicer):
    """Streams one token for each `go`, so that a test decides when the next comes."""

    def __init__(self) -> None:
        self.go = asyncio.Semaphore(0)

    async def Status(self, request: pb.StatusRequest, context: object) -> pb.SchedulerStatus:
        return pb.SchedulerStatus(scheduler_id="counting")

    async def Generate(self, request: pb.GenerateRequest, context: object) -> AsyncIterator[pb.TokenDelta]:
        for number in range(4):
            await self.go.acquire()
            yield pb.TokenDelta(token_ids=[number])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_certificates(tmp_path / "tls", days=1, hosts=("localhost", "127.0.0.1"))
    return tmp_path / "tls"


def identity(files: Path, role: str) -> Identity:
    made = open_identity(files, role)
    assert made is not None
    return made


@asynccontextmanager
async def serving(files: Path, service: Counting | None = None) -> AsyncIterator[RunningServer]:
    """A scheduler that edges may call."""
    add = (SERVICE, lambda server: rpc.add_SchedulerServicer_to_server(service or Counting(), server))
    async with serve("127.0.0.1:0", [add], identity=identity(files, "scheduler"), callers=("edge",)) as server:
        yield server


async def status_of(channel: grpc.aio.Channel) -> str:
    async with channel:
        return (await rpc.SchedulerStub(channel).Status(pb.StatusRequest(), timeout=60)).scheduler_id


async def test_the_right_role_is_let_in(files: Path) -> None:
    async with serving(files) as server:
        assert await status_of(open_channel(server.address, identity=identity(files, "edge"), role="scheduler")) == "counting"


async def test_a_certificate_of_another_role_is_told_which_role_may_call(files: Path) -> None:
    async with serving(files) as server:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await status_of(open_channel(server.address, identity=identity(files, "worker"), role="scheduler"))
        async with open_channel(server.address, identity=identity(files, "worker"), role="scheduler") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as stream_failure:
                await rpc.SchedulerStub(channel).Generate(pb.GenerateRequest(), timeout=60).read()
    for refusal in (failure.value, stream_failure.value):
        error = from_rpc_error(refusal)
        assert isinstance(error, PermissionDenied) and "names worker" in error.message and "called by edge" in error.message


async def test_a_server_of_another_role_is_not_taken_for_the_one_looked_for(files: Path) -> None:
    async with serving(files) as server:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await status_of(open_channel(server.address, identity=identity(files, "edge"), role="worker"))
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_no_certificate_a_foreign_authority_and_plaintext_do_not_get_through(files: Path, tmp_path: Path) -> None:
    write_certificates(tmp_path / "foreign", days=1)
    (tmp_path / "foreign/edge/ca.crt").write_bytes((files / "ca.crt").read_bytes())  # it trusts us, and we do not trust it
    target = (("grpc.ssl_target_name_override", name_of("scheduler")),)
    anonymous = grpc.ssl_channel_credentials((files / "ca.crt").read_bytes())
    async with serving(files) as server:
        for channel in (
            grpc.aio.secure_channel(server.address, anonymous, options=target),
            open_channel(server.address, identity=identity(tmp_path / "foreign", "edge"), role="scheduler"),
            open_channel(server.address),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await status_of(channel)
            assert failure.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_server_of_a_foreign_authority_is_not_trusted(files: Path, tmp_path: Path) -> None:
    write_certificates(tmp_path / "foreign", days=1)
    async with serving(tmp_path / "foreign") as server:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await status_of(open_channel(server.address, identity=identity(files, "edge"), role="scheduler"))
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_rotation_leaves_open_streams_and_serves_new_ones_with_the_new_files(files: Path) -> None:
    service, edge = Counting(), identity(files, "edge")
    async with serving(files, service) as server, open_channel(server.address, identity=edge, role="scheduler") as channel:
        call = rpc.SchedulerStub(channel).Generate(pb.GenerateRequest())
        service.go.release()
        assert (await call.read()).token_ids == [0]
        before = await _certificate_of(server.address, edge)
        write_certificates(files, days=1)
        assert await _certificate_of(server.address, edge) != before, "a new handshake sees the new certificate"
        for number in (1, 2, 3):
            service.go.release()
            assert (await call.read()).token_ids == [number], "the stream that was open goes on"


async def test_a_new_authority_is_trusted_after_its_file_changed(files: Path, tmp_path: Path) -> None:
    """The way an authority is replaced: both are trusted for a while."""
    write_certificates(tmp_path / "next", days=1)
    async with serving(files) as server:
        newcomer = open_channel(server.address, identity=identity(tmp_path / "next", "edge"), role="scheduler")
        with pytest.raises(grpc.aio.AioRpcError):
            await status_of(newcomer)
        both = (files / "ca.crt").read_bytes() + (tmp_path / "next/ca.crt").read_bytes()
        (files / "scheduler/ca.crt").write_bytes(both)
        (tmp_path / "next/edge/ca.crt").write_bytes(both)
        assert await status_of(open_channel(server.address, identity=identity(tmp_path / "next", "edge"), role="scheduler")) == "counting"


def test_a_rotation_half_done_keeps_what_was_whole(files: Path) -> None:
    edge = identity(files, "edge")
    before = edge.pem
    (files / "edge/tls.key").write_bytes((files / "worker/tls.key").read_bytes())
    assert edge.pem is before
    (files / "edge/tls.key").unlink()
    assert edge.pem is before
    write_certificates(files, days=1)
    assert edge.pem.certificate == (files / "edge/tls.crt").read_bytes() != before.certificate


async def test_https_serves_the_certificate_as_it_is_at_each_handshake(files: Path) -> None:
    app = FastAPI()
    door = read_identity("--door", files / "edge/tls.crt", files / "edge/tls.key")
    trust = ssl.create_default_context(cafile=files / "ca.crt")
    async with serve_rest(app, "127.0.0.1:0", 1.0, door) as server:
        seen = []
        for _ in range(2):
            async with httpx.AsyncClient(base_url=f"https://{server.address}", verify=trust, timeout=60) as client:
                assert (await client.get("/nothing")).status_code == 404
            host, port = server.address.split(":")
            seen.append(await asyncio.to_thread(ssl.get_server_certificate, (host, int(port))))
            write_certificates(files, days=1, hosts=("127.0.0.1",))
        async with httpx.AsyncClient(base_url=f"http://{server.address}", timeout=60) as plain:
            with pytest.raises(httpx.RemoteProtocolError):
                await plain.get("/nothing")
    assert seen[0] != seen[1]


async def test_a_door_asks_its_callers_for_no_certificate_and_takes_no_plaintext(files: Path) -> None:
    add = (SERVICE, lambda server: rpc.add_SchedulerServicer_to_server(Counting(), server))
    door = read_identity("--door", files / "edge/tls.crt", files / "edge/tls.key")
    trust = grpc.ssl_channel_credentials((files / "ca.crt").read_bytes())
    async with serve("127.0.0.1:0", [add], identity=door) as server:
        assert await status_of(grpc.aio.secure_channel(server.address, trust)) == "counting"
        with pytest.raises(grpc.aio.AioRpcError):
            await status_of(open_channel(server.address))


@pytest.mark.parametrize("given", [("--tls-cert",), ("--tls-cert", "--tls-ca"), ("--etcd-tls-key",)])
def test_some_of_the_files_are_refused_in_one_sentence(given: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"give all of them or none; missing: --") as refusal:
        load_config(ProcessConfig, [part for flag in given for part in (flag, "x.pem")])
    assert "\n" not in str(refusal.value) and given[0] in str(refusal.value)


@pytest.mark.parametrize(("wrong", "word"), [("tls.crt", "no certificate with its key"), ("tls.key", "key"), ("ca.crt", "authority")])
def test_a_file_that_is_not_what_it_should_be_is_named(files: Path, wrong: str, word: str) -> None:
    (files / "edge" / wrong).write_text("nonsense")
    flags = [part for flag, name in (("cert", "tls.crt"), ("key", "tls.key"), ("ca", "ca.crt")) for part in (f"--tls-{flag}", name)]
    argv = [part if part.startswith("--") else str(files / "edge" / part) for part in flags]
    with pytest.raises(ConfigError, match=word) as refusal:
        load_identities(load_config(ProcessConfig, argv))
    assert wrong in str(refusal.value) and "\n" not in str(refusal.value)
    (files / "edge" / wrong).unlink()
    with pytest.raises(ConfigError, match=f"{wrong} cannot be read"):
        load_identities(load_config(ProcessConfig, argv))


async def _certificate_of(address: str, caller: Identity) -> str:
    """The certificate that the server shows to a caller that connects now."""
    context = ssl.create_default_context(cafile=caller.authority)
    context.check_hostname = False
    context.load_cert_chain(caller.certificate, caller.key)
    host, port = address.split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()  # nothing is left to say, and nobody to wait for
    return str(shown)
