"""The etcd form of discovery against a real etcd that is killed, emptied, compacted and cut off."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from operator import eq
from pathlib import Path

import pytest
import structlog

from protos.etcd.v3 import rpc_pb2 as pb
from protos.etcd.v3 import rpc_pb2_grpc as rpc
from services import etcd_client
from services.errors import Unavailable
from services.etcd import EtcdDiscovery
from services.etcd_client import EtcdClient, delete, put
from services.grpc_channel import open_channel
from tests.fakes.etcd_server import EtcdServer, etcd_cluster
from tests.fakes.free_port import free_port
from tests.fakes.tcp_proxy import tcp_proxy

CLUSTER, TTL_S, PATIENCE_S = "test", 15, 120.0
Members = Mapping[str, bytes]

HOLDER = """
import asyncio, sys
from services.etcd import EtcdDiscovery
from services.telemetry import configure_logging
configure_logging("holder", "error")
async def main():
    async with EtcdDiscovery([sys.argv[1]], "test", 2) as discovery, discovery.register("groups", "g0", b"held"):
        print(await discovery.claim("g0", "s0"), flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd_cluster(tmp_path, 1) as (server,):
        yield server


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """An etcd on a busy machine has not gone. One that has is noticed at once all the same, but for one that stands still."""
    monkeypatch.setattr(etcd_client, "RPC_TIMEOUT_S", 20.0)


def connect(*endpoints: str, ttl_s: int = TTL_S) -> EtcdDiscovery:
    return EtcdDiscovery(endpoints, CLUSTER, ttl_s)


async def until(states: AsyncIterator[Members], holds: Callable[[Members], bool]) -> Members:
    """Reads on until a state for which `holds` is true."""
    last: Members = {}
    try:
        async with asyncio.timeout(PATIENCE_S):
            async for last in states:
                if holds(last):
                    return last
    except TimeoutError:
        raise AssertionError(f"not seen in {PATIENCE_S} s; the last state was {dict(last)}") from None
    raise AssertionError(f"the watch ended; the last state was {dict(last)}")


async def write(etcd: EtcdServer, *operations: pb.RequestOp) -> int:
    """What another client changes; returns the revision."""
    client = EtcdClient([etcd.endpoint])
    reply = await client.txn([], operations)
    await client.aclose()
    return reply.header.revision


async def compact(etcd: EtcdServer, revision: int) -> None:
    async with open_channel(etcd.endpoint) as channel:
        await rpc.KVStub(channel).Compact(pb.CompactionRequest(revision=revision, physical=True), timeout=PATIENCE_S)


def key(name: str) -> bytes:
    return f"/ossia/{CLUSTER}/groups/{name}".encode()


async def test_a_member_is_seen_while_registered_and_gone_after(etcd: EtcdServer) -> None:
    async with connect(etcd.endpoint) as worker, connect(etcd.endpoint) as scheduler:
        states = scheduler.watch("groups")
        assert await anext(states) == {}
        async with worker.register("groups", "127.0.0.1:5000", b"info"):
            assert await until(states, bool) == {"127.0.0.1:5000": b"info"}
            assert await anext(scheduler.watch("edges")) == {}
        await until(states, lambda members: not members)


async def test_closing_withdraws_everything_at_once(etcd: EtcdServer) -> None:
    async with connect(etcd.endpoint) as watcher:
        worker = connect(etcd.endpoint, ttl_s=600)
        async with worker.register("groups", "g0", b"info"):
            states, owners = watcher.watch("groups"), watcher.watch("owners")
            await until(states, lambda members: "g0" in members)
            assert await worker.claim("g0", "s0")
            await until(owners, lambda owners: owners == {"g0": b"s0"})
            await worker.aclose()
            await until(states, lambda members: not members)
            await until(owners, lambda owners: not owners)


async def test_of_two_claimants_one_wins_and_the_epoch_grows_with_each_owner(etcd: EtcdServer) -> None:
    async with connect(etcd.endpoint) as first, connect(etcd.endpoint) as second:
        epochs = await asyncio.gather(first.claim("g0", "s0"), second.claim("g0", "s1"))
        assert sorted(epoch is None for epoch in epochs) == [False, True]
        (winner, winner_id), (loser, loser_id) = ((first, "s0"), (second, "s1")) if epochs[0] else ((second, "s1"), (first, "s0"))
        epoch = max(epoch or 0 for epoch in epochs)
        for _ in range(2):
            assert await winner.claim("g0", winner_id) == epoch
            assert await loser.claim("g0", loser_id) is None
            await winner.release("g0", winner_id)
            taken = await loser.claim("g0", loser_id)
            assert taken is not None and taken > epoch
            winner, winner_id, loser, loser_id, epoch = loser, loser_id, winner, winner_id, taken


async def test_an_earlier_life_of_the_same_owner_still_holds_the_group(etcd: EtcdServer) -> None:
    async with connect(etcd.endpoint) as before, connect(etcd.endpoint) as after:
        assert await before.claim("g0", "s0")
        assert await after.claim("g0", "s0") is None


async def test_owners_never_show_a_state_from_before_a_claim(etcd: EtcdServer) -> None:
    async with connect(etcd.endpoint) as former, connect(etcd.endpoint) as owner:
        states = owner.watch("owners")
        for _ in range(20):
            assert await former.claim("g0", "s0")
            await until(states, lambda owners: owners.get("g0") == b"s0")
            await former.release("g0", "s0")
            assert await owner.claim("g0", "s1")
            assert await anext(states) == {"g0": b"s1"}
            await owner.release("g0", "s1")


async def test_etcd_killed_and_restarted_is_survived_by_members_owners_and_watchers(etcd: EtcdServer) -> None:
    async with connect(etcd.endpoint) as worker, connect(etcd.endpoint) as watcher, worker.register("groups", "g0", b"a"):
        epoch = await worker.claim("g0", "s0")
        states = watcher.watch("groups")
        await until(states, lambda members: members == {"g0": b"a"})
        with structlog.testing.capture_logs() as logs:
            etcd.kill()
            with pytest.raises(Unavailable, match="no etcd endpoint answered"):
                await worker.claim("g1", "s0")
            await asyncio.to_thread(etcd.start)
            async with worker.register("groups", "g1", b"b"):
                await until(states, lambda members: members == {"g0": b"a", "g1": b"b"})
        assert "etcd_snapshot_due" not in {line["event"] for line in logs}
        assert await worker.claim("g0", "s0") == epoch


async def test_a_member_registered_while_etcd_is_down_appears_when_it_is_back(etcd: EtcdServer) -> None:
    etcd.kill()
    async with connect(etcd.endpoint) as discovery, discovery.register("groups", "g0", b"a"):
        states = discovery.watch("groups")
        await asyncio.to_thread(etcd.start)
        assert await until(states, bool) == {"g0": b"a"}


async def test_etcd_that_lost_its_data_gets_the_members_again_and_epochs_still_grow(etcd: EtcdServer) -> None:
    async with connect(etcd.endpoint) as worker, connect(etcd.endpoint) as watcher, worker.register("groups", "g0", b"a"):
        for _ in range(20):
            await write(etcd, put(key("stranger"), b"x"))
        epoch = await worker.claim("g0", "s0")
        assert epoch is not None
        states, owners = watcher.watch("groups"), worker.watch("owners")
        await until(states, lambda members: "stranger" in members and "g0" in members)
        await until(owners, lambda owners: owners == {"g0": b"s0"})
        etcd.kill()
        etcd.wipe()
        await asyncio.to_thread(etcd.start)
        await until(states, lambda members: members == {"g0": b"a"})
        await until(owners, lambda owners: not owners)
        again = await worker.claim("g0", "s0", above=epoch)
        assert again is not None and again > epoch
        assert await worker.claim("g0", "s0") == again
        await worker.release("g0", "s0")
        later = await worker.claim("g0", "s0")
        assert later is not None and later > again
        last = await worker.claim("g0", "s0", above=later)
        assert last is not None and last > later


async def test_a_new_store_is_noticed_even_where_its_revision_has_overtaken_the_old(etcd: EtcdServer) -> None:
    async with tcp_proxy(etcd.endpoint) as wire, connect(wire.address) as watcher:
        await write(etcd, put(key("old"), b"x"))
        states = watcher.watch("groups")
        await until(states, lambda members: members == {"old": b"x"})
        await wire.cut()
        etcd.kill()
        etcd.wipe()
        await asyncio.to_thread(etcd.start)
        for _ in range(20):
            await write(etcd, put(key("new"), b"y"))
        await wire.mend()
        await until(states, lambda members: members == {"new": b"y"})


@pytest.mark.parametrize("is_compacted", [False, True])
async def test_a_watcher_that_was_cut_off_learns_what_it_missed(etcd: EtcdServer, is_compacted: bool) -> None:
    async with tcp_proxy(etcd.endpoint) as wire, connect(wire.address) as watcher:
        await write(etcd, put(key("stays"), b"1"), put(key("goes"), b"1"))
        states = watcher.watch("groups")
        await until(states, lambda members: len(members) == 2)
        with structlog.testing.capture_logs() as logs:
            await wire.cut()
            await write(etcd, put(key("comes"), b"1"))
            revision = await write(etcd, delete(key("goes")))
            if is_compacted:
                await compact(etcd, revision)
            await wire.mend()
            await until(states, lambda members: members == {"stays": b"1", "comes": b"1"})
        assert ("etcd_snapshot_due" in {line["event"] for line in logs}) == is_compacted
        await write(etcd, put(key("later"), b"1"))
        await until(states, lambda members: "later" in members)


async def test_a_stopped_holder_loses_everything_and_comes_back_by_itself(etcd: EtcdServer) -> None:
    holder = await asyncio.create_subprocess_exec(sys.executable, "-c", HOLDER, etcd.endpoint, stdout=asyncio.subprocess.PIPE)
    assert holder.stdout is not None
    try:
        epoch = int(await holder.stdout.readline())
        async with connect(etcd.endpoint) as successor:
            states, owners = successor.watch("groups"), successor.watch("owners")
            await until(states, lambda members: members == {"g0": b"held"})
            os.kill(holder.pid, signal.SIGSTOP)
            await until(states, lambda members: not members)
            await until(owners, lambda owners: not owners)
            taken = await successor.claim("g0", "s1")
            assert taken is not None and taken > epoch
            os.kill(holder.pid, signal.SIGCONT)
            await until(states, lambda members: members == {"g0": b"held"})
            assert await anext(successor.watch("owners")) == {"g0": b"s1"}
    finally:
        holder.kill()
        await holder.communicate()


async def test_a_claim_under_a_lost_lease_takes_a_new_one(etcd: EtcdServer) -> None:
    async with connect(etcd.endpoint) as owner, owner.register("groups", "g0", b"a"):
        epoch = await owner.claim("g0", "s0")
        owners = owner.watch("owners")
        await until(owners, lambda owners: owners == {"g0": b"s0"})
        client = EtcdClient([etcd.endpoint])
        lease = (await client.range(key("g0"))).kvs[0].lease
        await client.revoke_lease(lease)
        await client.aclose()
        await until(owners, lambda owners: not owners)
        again = await owner.claim("g0", "s0")
        assert epoch is not None and again is not None and again > epoch
        await until(owner.watch("groups"), lambda members: members == {"g0": b"a"})


async def test_an_endpoint_that_does_not_answer_is_passed_over(etcd: EtcdServer) -> None:
    async with connect(f"127.0.0.1:{free_port()}", etcd.endpoint) as discovery, discovery.register("groups", "g0", b"a"):
        assert await until(discovery.watch("groups"), bool) == {"g0": b"a"}


@pytest.mark.parametrize(("lose", "regain"), [(EtcdServer.kill, EtcdServer.start), (EtcdServer.stop, EtcdServer.resume)])
async def test_the_members_of_etcd_may_be_lost_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: Callable[[EtcdServer], None], regain: Callable[[EtcdServer], None]
) -> None:
    monkeypatch.setattr(etcd_client, "RPC_TIMEOUT_S", 2.0)
    with etcd_cluster(tmp_path, 3) as members:
        endpoints = [member.endpoint for member in members]
        async with connect(*endpoints) as discovery, connect(*endpoints) as other, discovery.register("groups", "g0", b"a"):
            states = discovery.watch("groups")
            for member in members:
                lose(member)
                async with other.register("groups", member.name, b"b"):
                    await until(states, partial(eq, {"g0": b"a", member.name: b"b"}))
                await asyncio.to_thread(regain, member)


async def test_a_slow_reader_gets_the_latest_state(etcd: EtcdServer) -> None:
    async with connect(etcd.endpoint) as watcher:
        slow, quick = watcher.watch("groups"), watcher.watch("groups")
        await anext(slow)
        for index in range(5):
            await write(etcd, put(key("g0"), b"%d" % index))
        await until(quick, lambda members: members == {"g0": b"4"})
        assert await anext(slow) == {"g0": b"4"}


async def test_closing_leaves_no_task_and_ends_the_watches(etcd: EtcdServer) -> None:
    before = asyncio.all_tasks()
    discovery = connect(etcd.endpoint)
    async with discovery.register("groups", "g0", b"a"):
        states = discovery.watch("groups")
        await until(states, bool)
        await discovery.claim("g0", "s0")
    await discovery.aclose()
    async with asyncio.timeout(PATIENCE_S):
        assert [members async for members in states] == []
        if ending := asyncio.all_tasks() - before:  # gRPC's own end a moment later
            await asyncio.wait(ending)
    assert asyncio.all_tasks() == before
