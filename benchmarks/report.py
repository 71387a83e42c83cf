"""What every benchmark prints and writes: a table, and a JSON file whose `figures` is a flat object of numbers."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

PACKAGES = ("ossia", "torch", "triton", "transformers", "grpcio", "protobuf", "openai-harmony")


@dataclass
class Report:
    """Rows to read and figures to compare. A figure's name ends in its unit, or says that it is a ratio."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def add(self, *cells: object, **figures: float) -> None:
        self.rows.append([str(cell) for cell in cells])
        self.figures.update(figures)

    def show(self) -> None:
        table = Table(*self.columns, title=self.title)
        for row in self.rows:
            table.add_row(*row)
        Console().print(table)

    def write(self, path: Path) -> None:
        content = {"title": self.title, "command": _command(), "device": describe_device(), "versions": versions(), "figures": self.figures}
        path.write_text(json.dumps(content, indent=2) + "\n")


def finish(report: Report, json_path: Path | None) -> None:
    """What `main` of each benchmark ends with."""
    report.show()
    if json_path is not None:
        report.write(json_path)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Flags that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    return made


def _command() -> str:
    spec = sys.modules["__main__"].__spec__
    return " ".join(["python", "-m", spec.name if spec else sys.argv[0], *sys.argv[1:]])


def describe_device() -> str:
    """The GPU where torch is loaded and sees one, else the processor."""
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    models = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
