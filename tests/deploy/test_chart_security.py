"""checkov finds nothing in what the chart renders."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tests.deploy.chart import EXAMPLES, Manifest, Values, example, render

CHECKOV = Path(sys.prefix) / "checkov/bin/checkov"
SKIPPED = {
    "CKV_K8S_43": "an image's digest is known once it is built and pushed: image.*.digest pins it, and then this check passes too",
}
PINNED: Values = {"digest": "sha256:" + "0" * 64}


def check(folder: Path, *skipped: str) -> dict[str, int]:
    """Failed checks by id, over the files in a folder. The skipped ones are not run."""
    assert CHECKOV.exists(), "checkov is missing: `make setup` installs it"
    command = [str(CHECKOV), "--directory", str(folder), "--framework", "kubernetes", "--skip-download", "--output", "json", "--soft-fail"]
    if skipped:
        command += ["--skip-check", ",".join(skipped)]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert report["summary"]["parsing_errors"] == 0 and report["summary"]["passed"] > 300
    failed = [one["check_id"] for one in report["results"]["failed_checks"]]
    return {name: failed.count(name) for name in set(failed)}


def write(folder: Path, name: str, manifests: list[Manifest]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(manifests))


def test_checkov_fails_nothing_but_what_is_made_wrong(tmp_path: Path) -> None:
    """Over the default and the examples; one pod more, whose root is writable, shows that it judges."""
    assert len(SKIPPED) <= 3
    for name in ("default", *EXAMPLES):
        write(tmp_path, name, render(example(name)))
    wrong = next(one for one in render({}) if one["metadata"]["name"] == "demo-ossia-scheduler" and one["kind"] == "Deployment")
    wrong["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    write(tmp_path, "wrong", [wrong])
    assert check(tmp_path, *SKIPPED) == {"CKV_K8S_22": 1}


def test_checkov_fails_nothing_at_all_with_pinned_images(tmp_path: Path) -> None:
    bundled = {"bundled": {"image": PINNED}}
    write(tmp_path, "pinned", render({"image": {"control": PINNED, "worker": PINNED}, "etcd": bundled, "redis": bundled}))
    assert check(tmp_path) == {}
