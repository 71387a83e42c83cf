"""Discovery over an etcd that takes certificates only."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.certificates import write_certificates
from services.discovery import Discovery, open_discovery
from services.errors import Unavailable
from services.tls import Identity
from tests.fakes.etcd_server import EtcdServer, etcd_cluster

TTL_S = 15


def files_of(folder: Path, role: str) -> tuple[Path, Path, Path]:
    return folder / role / "tls.crt", folder / role / "tls.key", folder / role / "ca.crt"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_certificates(tmp_path / "tls", days=1, hosts=("127.0.0.1",))
    return tmp_path / "tls"


@pytest.fixture
def etcd(tmp_path: Path, files: Path) -> Iterator[EtcdServer]:
    with etcd_cluster(tmp_path, 1, files_of(files, "edge")) as (server,):
        yield server


async def claim(discovery: Discovery, group: str, above: int = 0) -> int:
    """As soon as etcd is there, and answers in time."""
    while True:
        try:
            epoch = await discovery.claim(group, "s0", above)
        except Unavailable:
            continue
        assert epoch is not None
        return epoch


async def test_groups_are_claimed_over_mutual_tls_and_after_the_certificate_changed(etcd: EtcdServer, files: Path) -> None:
    identity = Identity(*files_of(files, "scheduler"))
    async with open_discovery([etcd.endpoint], "test", {}, TTL_S, identity) as discovery:
        first = await claim(discovery, "g0")
        write_certificates(files, days=1, hosts=("127.0.0.1",))
        etcd.kill()
        with pytest.raises(Unavailable):
            await discovery.claim("g1", "s0")
        await asyncio.to_thread(etcd.start)
        assert await claim(discovery, "g1", above=first) > first


async def test_etcd_is_not_reached_in_plaintext_or_with_a_foreign_certificate(etcd: EtcdServer, tmp_path: Path) -> None:
    write_certificates(tmp_path / "foreign", days=1)
    for identity in (None, Identity(*files_of(tmp_path / "foreign", "scheduler"))):
        async with open_discovery([etcd.endpoint], "test", {}, TTL_S, identity) as discovery:
            with pytest.raises(Unavailable):
                await discovery.claim("g0", "s0")
