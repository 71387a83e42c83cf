"""The chart as tests see it: rendered by the real Helm library into manifests."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy/helm/ossia"
EXAMPLES = {file.stem: file for file in sorted((CHART / "examples").glob("*.yaml"))}
RELEASE, NAMESPACE = "demo", "serving"
Manifest = dict[str, Any]
Values = dict[str, Any]


@cache
def chart() -> helm.Chart:
    return helm.Chart.load(CHART)


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    return found


def example(name: str) -> Values:
    """The values of an example; "default" are the chart's own."""
    return {} if name == "default" else yaml.safe_load(EXAMPLES[name].read_text())


def render_text(values: Values) -> dict[str, str]:
    """Template to what it renders. Raises helm.HelmError."""
    rendered: dict[str, str] = chart().render(values, name=RELEASE, namespace=NAMESPACE)
    return {name.removeprefix("ossia/templates/"): text for name, text in sorted(rendered.items())}


def render(values: Values) -> list[Manifest]:
    """Every object. Raises helm.HelmError."""
    texts = render_text(values)
    return [found for name, text in texts.items() if name != "NOTES.txt" for found in yaml.load_all(text, yaml.CSafeLoader) if found]


def pod_specs(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The pods that the objects make, by kind and name."""
    return {
        f"{one['kind']}/{one['metadata']['name']}": one["spec"]["template"]["spec"]
        for one in manifests
        if "template" in one.get("spec", {})
    }


def containers(manifests: list[Manifest]) -> Iterator[Manifest]:
    for spec in pod_specs(manifests).values():
        yield from spec["containers"]
        yield from spec.get("initContainers", ())


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] in kinds]


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return selector.items() <= labels.items()
