"""What the tree promises: imports point one way, and the light processes stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROCESSES = ("edge", "scheduler", "worker")
MAY_IMPORT = {
    "protos": {"protos"},
    "services": {"services", "protos"},
    "edge": {"edge", "services", "protos"},
    "scheduler": {"scheduler", "services", "protos"},
    "worker": {"worker", "services", "protos"},
    "clients": {"clients", "services", "protos"},
    "models": {"models", "services", "protos", "edge", "worker"},
    "cli": {"cli", "services", "protos", "edge", "scheduler", "worker", "models"},
}


def imported_parts(file: Path) -> set[str]:
    """The top-level packages of this tree that a file imports, at any depth of it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found.add((node.module or "").split(".")[0])
    return found & MAY_IMPORT.keys()


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part: str) -> None:
    files = list((ROOT / part).rglob("*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): extra for file in files if (extra := imported_parts(file) - MAY_IMPORT[part])}
    assert not wrong


def test_kernels_know_no_models_and_models_no_process() -> None:
    for folder, forbidden in (
        ("worker/kernels", ("worker.models", "worker.service", "worker.runner")),
        ("worker/models", ("worker.service", "grpc")),
    ):
        for file in (ROOT / folder).glob("*.py"):
            assert not [name for name in forbidden if f"{name} import" in file.read_text() or f"import {name}" in file.read_text()], file


@pytest.mark.parametrize("module", ["edge.__main__", "scheduler.__main__", "cli.main"])
def test_edge_scheduler_and_command_import_no_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_stubs_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "protos.generate", str(tmp_path)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*")]
    assert written
    stale = [str(path) for path in written if (tmp_path / path).read_bytes() != (ROOT / "protos" / path).read_bytes()]
    assert not stale, "run `make protos` and commit what it writes"


def test_no_file_says_more_than_the_project_may() -> None:
    """Machine paths and names of registries do not belong into the repository."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    forbidden = ("/work/" + "main", "/work/" + "shared", "/" + "root/")
    named = [name for name in tracked if Path(name).suffix in {".py", ".md", ".toml", ".proto", ".sh", ".yaml"}]
    assert not [name for name in named if any(text in (ROOT / name).read_text() for text in forbidden)]
