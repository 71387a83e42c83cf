"""Writes the Python stubs and their types beside every `.proto`: `python -m protos.generate [TARGET_DIR]`.

Other languages compile the files with `protos/` as their root (`import "ossia/v1/sampling.proto"`); Python finds the stubs under the
package `protos`, so the one line that differs, the import between stubs, is written anew.
"""

import re
import sys
import sysconfig
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
STUB_IMPORT = re.compile(r"^(from|import) ((?:ossia|etcd)\.[\w.]*|(?:ossia|etcd))(?= import| as|$)", re.MULTILINE)


def generate(target: Path) -> list[Path]:
    """Compiles all contracts under ROOT into `target`; returns the files written, relative to it."""
    sources = sorted(ROOT.glob("*/v*/*.proto"))
    scripts = Path(sysconfig.get_path("scripts"))
    plugins = [f"--plugin=protoc-gen-{name}={scripts / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    outputs = [f"--{kind}_out={options}{target}" for kind, options in OUTPUTS]
    if protoc.main(["protoc", f"-I{ROOT}", *plugins, *outputs, *map(str, sources)]) != 0:
        raise SystemExit("protoc failed: see the lines above")
    return [_rehome(path, target) for source in sources for path in _stubs(target / source.relative_to(ROOT))]


OUTPUTS = (("python", ""), ("grpc_python", ""), ("mypy", "quiet:"), ("mypy_grpc", "quiet:"))


def _stubs(source: Path) -> list[Path]:
    """The files that one contract becomes; without a service, those of the second kind hold nothing and are dropped."""
    kinds = ["_pb2.py", "_pb2.pyi"]
    if "Stub" in (grpc := source.with_name(source.stem + "_pb2_grpc.py")).read_text():
        kinds += ["_pb2_grpc.py", "_pb2_grpc.pyi"]
    else:
        grpc.unlink()
        grpc.with_suffix(".pyi").unlink(missing_ok=True)
    return [source.with_name(source.stem + kind) for kind in kinds]


def _rehome(path: Path, target: Path) -> Path:
    path.write_text(STUB_IMPORT.sub(r"\1 protos.\2", path.read_text()))
    return path.relative_to(target)


if __name__ == "__main__":
    written = generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    print(f"{len(written)} files written")
