"""The static form, and the choice between the two."""

import asyncio
from pathlib import Path

import pytest

from services.discovery import StaticDiscovery, open_discovery
from services.etcd import EtcdDiscovery
from tests.fakes.etcd_server import EtcdServer

MEMBERS = {"schedulers": {"127.0.0.1:5000": b"127.0.0.1:5000"}}


async def test_static_members_are_shown_once_and_stay() -> None:
    async with StaticDiscovery(MEMBERS) as discovery:
        states = discovery.watch("schedulers")
        assert await anext(states) == MEMBERS["schedulers"]
        waiting = asyncio.ensure_future(anext(states, None))
        async with discovery.register("schedulers", "127.0.0.1:6000", b"x"):
            assert await anext(discovery.watch("schedulers")) == MEMBERS["schedulers"]
        assert not waiting.done()
    assert await waiting is None


async def test_a_static_kind_without_members_is_empty() -> None:
    assert await anext(StaticDiscovery(MEMBERS).watch("groups")) == {}


async def test_a_static_claim_gives_no_fencing_epoch() -> None:
    discovery = StaticDiscovery(MEMBERS)
    assert await discovery.claim("g0", "s0", above=7) == 0
    await discovery.release("g0", "s0")


async def test_endpoints_choose_etcd_and_none_choose_static() -> None:
    async with open_discovery((), "test", MEMBERS) as static, open_discovery(("127.0.0.1:1",), "test", {}) as etcd:
        assert isinstance(static, StaticDiscovery) and isinstance(etcd, EtcdDiscovery)


def test_a_missing_etcd_binary_fails_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="install Debian's etcd-server"):
        EtcdServer("etcd0", tmp_path).start()
