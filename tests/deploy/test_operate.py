"""The guide's commands run as they stand there, its table is what the command computes, and its links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sizing import rows
from tests.fakes.free_port import free_port

ROOT = Path(__file__).parent.parent.parent
GUIDE = ROOT / "docs" / "operate.md"
TEXT = GUIDE.read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
RUNNABLE = [block for block in BLOCKS if not block.startswith("# cluster")]


def run(block: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """With a folder of ours for /etc/ossia, and free ports for the ones named."""
    ours = {"/etc/ossia": str(folder), "8000": str(free_port()), "9000": str(free_port())}
    script = re.sub("|".join(ours), lambda named: ours[named[0]], block)  # at once: a port of ours may hold the digits of another
    bin_dir = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "OSSIA_HOME": str(folder / "home"), "COLUMNS": "200"}
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: " ".join(block.split()[:3]))
def test_a_block_runs_as_it_stands(block: str, tmp_path: Path) -> None:
    done = run(block, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_most_of_the_guide_is_run_and_the_rest_says_why_not() -> None:
    assert len(RUNNABLE) >= 5
    assert all(re.match(r"# cluster(: .+)?\n", block) for block in BLOCKS if block not in RUNNABLE)


def test_the_sizes_are_what_the_command_computes() -> None:
    table = TEXT.partition("<!-- sizing: begin -->\n")[2].partition("<!-- sizing: end -->")[0]
    shown = [tuple(cell.strip() for cell in line.strip("|\n").split("|")) for line in table.splitlines()[2:]]
    assert shown == rows()


def test_links_and_pictures_are_there() -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", TEXT)]
    assert links and [link for link in links if not (GUIDE.parent / link).exists()] == []


def test_flags_that_the_guide_names_exist() -> None:
    """Long options of our own processes that stand alone in the text."""
    named = set(re.findall(r"`(--[a-z-]+)`", TEXT))
    known = "".join(
        subprocess.run([sys.executable, "-m", process, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for process in ("edge", "scheduler", "worker")
    )
    assert named and [flag for flag in named if not re.search(rf"{flag}\b", known)] == []
