"""Discovery over a real etcd, which dies under a running cluster: traffic goes on, and membership works again after."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

from tests.cluster.conftest import REPLY
from tests.cluster.local_cluster import ROOT, SETTLE_TIMEOUT_S, STOP_TIMEOUT_S, LocalCluster, wait_until
from tests.fakes.etcd_server import etcd_cluster

ANSWER = REPLY.rpartition("<|message|>")[2]
HELLO = [{"role": "user", "content": "Hello"}]


@contextmanager
def worker(cluster: LocalCluster, endpoint: str, script: Path) -> Iterator[None]:
    """One more group of the same model, found through etcd alone."""
    flags = (
        "--backend",
        "scripted",
        "--script",
        str(script),
        "--model",
        "scripted",
        "--group-id",
        "late",
        "--etcd",
        endpoint,
        "--drain-s",
        "5",
        *cluster.identity_flags("worker"),
    )
    process = subprocess.Popen([sys.executable, "-m", "worker", *flags], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)


def group_ids(cluster: LocalCluster) -> list[str]:
    return sorted(group.group_id for group in cluster.status().groups)


def test_etcd_killed_and_restarted_stops_no_traffic_and_membership_works_after(tmp_path: Path, script: Path) -> None:
    with etcd_cluster(tmp_path, 1) as (etcd,):
        flags = ("--backend", "scripted", "--script", str(script), "--step-ms", "2", "--etcd", etcd.endpoint)
        with LocalCluster(tmp_path, *flags) as cluster, openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="any", max_retries=0) as client:
            stream = client.chat.completions.create(model="scripted", messages=HELLO, stream=True)
            first = next(iter(stream))
            etcd.kill()
            words = [chunk.choices[0].delta.content or "" for chunk in (first, *stream)]
            assert "".join(words) == ANSWER, "the stream that was open went on"
            assert client.chat.completions.create(model="scripted", messages=HELLO).choices[0].message.content == ANSWER
            etcd.start()
            assert client.chat.completions.create(model="scripted", messages=HELLO).choices[0].message.content == ANSWER
            with worker(cluster, etcd.endpoint, script):
                wait_until(lambda: group_ids(cluster) == ["group-0", "late"], SETTLE_TIMEOUT_S, cluster)
                assert all(group.epoch > 0 for group in cluster.status().groups)
            wait_until(lambda: group_ids(cluster) == ["group-0"], SETTLE_TIMEOUT_S, cluster)
            assert client.chat.completions.create(model="scripted", messages=HELLO).choices[0].message.content == ANSWER
