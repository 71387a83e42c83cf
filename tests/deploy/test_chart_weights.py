"""The init container that the chart makes is a command that downloads what the chart lists, and refuses the rest."""

import asyncio
import copy
import hashlib
import subprocess
import sys
from pathlib import Path

from tests.deploy.chart import Values, example, of_kind, pod_specs, render
from tests.fakes.breaking_store import BreakingStore, serve_files

CONTENT = {"config.json": b"{}", "model.safetensors": b"\0" * 5000}


def values(content: dict[str, bytes]) -> Values:
    found = copy.deepcopy(example("two-models"))
    found["models"]["gpt-oss-20b"]["source"]["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    return found


def run_init(store: BreakingStore, folder: Path, content: dict[str, bytes]) -> "subprocess.CompletedProcess[str]":
    """Runs the init container's command with its folders and its store in reach of the test."""
    manifests = render(values(content))
    (config_map,) = (one for one in of_kind(manifests, "ConfigMap") if one["metadata"]["name"] == "demo-ossia-manifest-gpt-oss-20b")
    (folder / "SHA256SUMS").write_text(config_map["data"]["SHA256SUMS"])
    (init,) = pod_specs(manifests)["Deployment/demo-ossia-worker-small"]["initContainers"]
    moved = {
        "https://models.example.com/gpt-oss-20b/": store.url,
        "/models": str(folder / "models"),
        "--manifest=/etc/ossia/manifest/SHA256SUMS": f"--manifest={folder / 'SHA256SUMS'}",
    }
    assert moved.keys() <= set(init["args"])
    arguments = [moved.get(argument, argument) for argument in init["args"]]
    return subprocess.run([sys.executable, "-m", "cli.main", *arguments], check=False, capture_output=True, text=True)


async def test_the_init_container_downloads_and_resumes(tmp_path: Path) -> None:
    async with serve_files(CONTENT) as store:
        store.breaks_after = [1, 2000]
        ended = await asyncio.to_thread(run_init, store, tmp_path, CONTENT)
    assert ended.returncode == 0, ended.stderr
    assert {name: (tmp_path / "models" / name).read_bytes() for name in CONTENT} == CONTENT


async def test_the_init_container_fails_on_a_wrong_digest(tmp_path: Path) -> None:
    async with serve_files({**CONTENT, "model.safetensors": b"\1" * 5000}) as store:
        ended = await asyncio.to_thread(run_init, store, tmp_path, CONTENT)
    assert ended.returncode == 1 and "model.safetensors: what the store has is not what is listed" in ended.stderr
    assert not (tmp_path / "models/model.safetensors").exists()
