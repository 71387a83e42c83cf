"""The chart renders by the real Helm library into objects that Kubernetes takes."""

from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from deploy.grafana.queries import list_metrics
from edge.config import EdgeConfig
from edge.routing.model_settings import Price, read_settings
from services.config import load_config
from tests.deploy.chart import CHART, EXAMPLES, NAMESPACE, Manifest, example, of_kind, render
from tests.deploy.golden import GOLDEN, golden_text


def closed(schema: Any) -> Any:
    """The schema, with no properties but those it names."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return {**inner, "type": "object", "additionalProperties": False} if isinstance(schema.get("properties"), dict) else inner


CUSTOM = closed(yaml.safe_load((Path(__file__).parent / "custom_resources.yaml").read_text()))
NAMES = ["default", *EXAMPLES]
QUEUE_SECONDS = "ossia_scheduler_group_queue_seconds"
VERSIONS = kubernetes_validate.utils.all_versions()[-3:]


@pytest.mark.parametrize("name", NAMES)
def test_strict_lint_finds_nothing(name: str) -> None:
    report = helm.lint(CHART, example(name), strict=True)
    assert report["total_charts_linted"] == 1
    assert not report["errors"] and not report["messages"]


@pytest.mark.parametrize("name", NAMES)
def test_rendering_is_as_recorded(name: str) -> None:
    """Run `python -m tests.deploy.golden` after a change, and read what it changed."""
    assert golden_text(example(name)) == (GOLDEN / f"{name}.yaml").read_text()


def validate(manifest: Manifest, version: str) -> None:
    """Raises where the API server would refuse the object, unknown fields included."""
    schema = CUSTOM.get(f"{manifest['apiVersion']}/{manifest['kind']}")
    if schema is None:
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    assert manifest.keys() <= {"apiVersion", "kind", "metadata", "spec"}
    Draft202012Validator({**schema, "$defs": CUSTOM["$defs"]}).validate(manifest["spec"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_objects_are_valid(name: str, version: str) -> None:
    manifests = render(example(name))
    assert manifests
    for manifest in manifests:
        validate(manifest, version)


def test_examples_make_every_custom_resource() -> None:
    made = {f"{one['apiVersion']}/{one['kind']}" for name in EXAMPLES for one in render(example(name))}
    assert CUSTOM.keys() - {"$defs"} <= made


def test_validation_refuses_unknown_fields() -> None:
    manifests = render(example("gpt-oss-120b-eight-gpus"))
    for kind in ("Deployment", "ScaledObject", "PodMonitor"):
        manifest = of_kind(manifests, kind)[0]
        manifest["spec"]["replica"] = 1
        with pytest.raises(ValidationError, match="replica"):
            validate(manifest, VERSIONS[-1])


def test_package_holds_schema_dashboards_and_rules(tmp_path: Path) -> None:
    archive = helm.package(CHART, destination=tmp_path)
    with helm.Chart.load(archive) as packed:
        files = {one["name"] for one in packed.files}
        assert packed.schema and "files/rules.yaml" in files
        assert not [name for name in files if name.startswith("files/dashboards/") and not name.endswith(".json")]


def test_groups_scale_on_a_metric_that_the_scheduler_has() -> None:
    listed = {metric.name: metric.labels for metric in list_metrics()["scheduler"]}
    external = [
        metric["external"]["metric"] for metric in of_kind(render(example("two-models")), "HorizontalPodAutoscaler")[-1]["spec"]["metrics"]
    ]
    assert [(one["name"], set(one["selector"]["matchLabels"]) <= set(listed[one["name"]])) for one in external] == [(QUEUE_SECONDS, True)]
    (trigger,) = of_kind(render(example("gpt-oss-120b-eight-gpus")), "ScaledObject")[0]["spec"]["triggers"]
    assert trigger["metadata"]["query"] == f'sum({QUEUE_SECONDS}{{namespace="{NAMESPACE}",model="openai/gpt-oss-120b"}})'


def test_edges_read_what_the_chart_says_of_models(tmp_path: Path) -> None:
    (config_map,) = (one for one in of_kind(render(example("two-models")), "ConfigMap") if one["metadata"]["name"] == "demo-ossia-models")
    (tmp_path / "models.yaml").write_text(config_map["data"]["models.yaml"])
    settings = read_settings(load_config(EdgeConfig, ["--models-file", str(tmp_path / "models.yaml")]))
    assert settings["gpt-oss-120b"].aliases == ("default", "openai/gpt-oss-120b")
    assert settings["gpt-oss-120b"].price == Price(input=0.1, cached_input=0.02, output=0.5)
