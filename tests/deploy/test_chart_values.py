"""Values that cannot work are refused with the key and the cure, and every value is described."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import helm_python as helm
import pytest
import yaml

from deploy.helm.values_table import CHART, fill, resolve
from tests.deploy.chart import EXAMPLES, Values, example, render, schema

Path = tuple[str, ...]
SCHEMA = schema()


def objects(node: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every object of the schema with the path to it; a map of the user's own names is entered under the name `x`."""
    node = resolve(node, SCHEMA["$defs"])
    if node.get("type") == "object":
        yield path, node
    for key, child in node.get("properties", {}).items():
        yield from objects(child, (*path, key))
    if isinstance(named := node.get("additionalProperties"), dict):
        yield from objects(named, (*path, "x"))


OBJECTS = dict(objects(SCHEMA))
KEYS = [(*path, key) for path, node in OBJECTS.items() for key in node.get("properties", {})]


def nested(path: Path, value: object) -> Values:
    for key in reversed(path):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def refusal(values: Values) -> str:
    with pytest.raises(helm.HelmError) as caught:
        render(values)
    return str(caught.value)


def test_objects_are_closed_or_maps_of_described_values() -> None:
    for path, node in OBJECTS.items():
        if path[-1:] != ("global",):
            assert "additionalProperties" in node, path
            assert (node["additionalProperties"] is False) == ("properties" in node), path


def test_every_key_is_described() -> None:
    undescribed = [path for path in KEYS if not resolve(OBJECTS[path[:-1]]["properties"][path[-1]], SCHEMA["$defs"]).get("description")]
    assert len(KEYS) > 150 and not undescribed


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_a_typo_in_any_key_is_refused(path: Path) -> None:
    typo = path[-1] + "e"
    assert f"additional properties '{typo}' not allowed" in refusal(nested((*path[:-1], typo), {}))


def test_defaults_name_every_key_that_is_not_the_users_own() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    for path in KEYS:
        if "x" in path or "pod" in path or "global" in path or "model" in path:
            continue
        found: Any = defaults
        for key in path:
            assert key in found, path
            found = found[key]


def test_readme_table_is_current() -> None:
    readme = (CHART / "README.md").read_text()
    assert fill(readme) == readme, "run `python -m deploy.helm.values_table`"


GROUP: Values = {
    "worker": {"groups": {"g": {"model": "m"}}},
    "models": {"m": {"sizeGib": 13, "source": {"claim": {"name": "c", "accessMode": "ReadOnlyMany"}}}},
}
URL = {"url": "https://models.example.com/m", "files": {"config.json": "0" * 64}}


def changed(values: Values, path: str, value: object) -> Values:
    values = copy.deepcopy(values)
    *parents, last = path.split(".")
    here = values
    for key in parents:
        here = here.setdefault(key, {})
    here[last] = value
    return values


REFUSED: dict[str, tuple[Values, str]] = {
    "gpus that are no tensor parallel size": (
        changed(GROUP, "worker.groups.g.gpus", 3),
        "/worker/groups/g/gpus': value must be one of 0, 1, 2, 4, 8",
    ),
    "gpus that do not divide": (
        changed(changed(GROUP, "models.m.kvHeads", 2), "worker.groups.g.gpus", 4),
        "worker.groups.g.gpus: 4 does not divide the 2 key and value heads of m; take a divisor",
    ),
    "a group of nothing": (
        changed(GROUP, "worker.groups.g.replicas", 0),
        "worker.groups.g.replicas: 0 serves nothing; set it to 1 or more, or worker.groups.g.autoscaling.enabled to true",
    ),
    "no edge": ({"edge": {"replicas": 0}}, "edge.replicas: 0 serves nothing; set it to 1 or more, or edge.autoscaling.enabled to true"),
    "no scheduler": ({"scheduler": {"replicas": 0}}, "at '/scheduler/replicas': minimum: got 0, want 1"),
    "nothing to serve": ({"worker": {"trial": False}}, "worker.groups: there is no group, so nothing could be served; name one"),
    "an unknown model": (
        changed(GROUP, "worker.groups.g.model", "n"),
        'worker.groups.g.model: there is no model "n" under models; name one of: m',
    ),
    "two etcds": (
        changed({}, "etcd.external.endpoints", {"etcd": 2379}),
        "set etcd.bundled.enabled to false, or remove etcd.external.endpoints",
    ),
    "no etcd": (changed({}, "etcd.bundled.enabled", False), "etcd.external.endpoints: there is no etcd; name one's host and port"),
    "etcd TLS without a secret": (
        {"etcd": {"bundled": {"enabled": False}, "external": {"endpoints": {"etcd": 2379}, "tls": True}}},
        "etcd.external.existingSecret: etcd.external.tls needs it; name a secret",
    ),
    "two Redises": (
        changed({}, "redis.external.existingSecret", "r"),
        "set redis.bundled.enabled to false, or remove redis.external.existingSecret",
    ),
    "two sources of JWT keys": (
        {"auth": {"jwt": {"jwksUrl": "https://login.example.com/keys", "existingSecret": "s"}}},
        "auth.jwt.jwksUrl: auth.jwt.existingSecret gives the keys too; keep one of the two",
    ),
    "keys and no keys": (
        {"auth": {"allowAnonymous": True, "apiKeys": {"existingSecret": "s"}}},
        "auth.allowAnonymous: keys or tokens are asked for too; set auth.allowAnonymous to false",
    ),
    "tokens of anybody": (
        {"auth": {"jwt": {"existingSecret": "s", "issuer": "i"}}},
        "auth.jwt.issuer: tokens for somebody else would count here; name auth.jwt.issuer and auth.jwt.audience",
    ),
    "a door open to everyone": (
        {"edge": {"ingress": {"enabled": True, "host": "api.example.com"}}},
        "auth.apiKeys.existingSecret: the edge would be open to everyone beyond the cluster; name a secret of keys",
    ),
    "an ingress without a host": (
        {"edge": {"ingress": {"enabled": True}}, "auth": {"allowAnonymous": True}},
        "edge.ingress.host: edge.ingress.enabled needs it; name the host",
    ),
    "an ingress that the policy keeps out": (
        {"edge": {"ingress": {"enabled": True, "host": "api.example.com"}}, "auth": {"allowAnonymous": True}},
        "networkPolicy.clients: the network policy keeps the ingress or gateway out; name its namespace",
    ),
    "a route without a gateway": (
        {"edge": {"gateway": {"enabled": True}}, "auth": {"allowAnonymous": True}},
        "edge.gateway.parents: edge.gateway.enabled needs it; name the gateway",
    ),
    "an edge's bounds the wrong way round": (
        {"edge": {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 4}}},
        "edge.autoscaling.maxReplicas: must not be less than edge.autoscaling.minReplicas",
    ),
    "a group's bounds the wrong way round": (
        changed(GROUP, "worker.groups.g.autoscaling", {"enabled": True, "kind": "hpa", "minReplicas": 5, "maxReplicas": 4}),
        "worker.groups.g.autoscaling.maxReplicas: must not be less than autoscaling.minReplicas",
    ),
    "KEDA without Prometheus": (
        changed(GROUP, "worker.groups.g.autoscaling", {"enabled": True}),
        "observability.prometheusAddress: worker.groups.g.autoscaling asks Prometheus for queue seconds; name it",
    ),
    "TLS without certificates": (
        {"tls": {"enabled": True}},
        "tls.existingSecrets.edge: tls.enabled needs it; name a secret with tls.crt, tls.key and ca.crt, or tls.certManager.issuerName",
    ),
    "two makers of a certificate": (
        {"tls": {"enabled": True, "certManager": {"issuerName": "ca"}, "existingSecrets": {"worker": "s"}}},
        "tls.existingSecrets.worker: tls.certManager.issuerName makes one too; keep one of the two",
    ),
    "a claim of one node for several pods": (
        changed(changed(GROUP, "models.m.source.claim.accessMode", "ReadWriteOnce"), "worker.groups.g.replicas", 2),
        'worker.groups.g: 2 pods would share the claim "c", which is ReadWriteOnce; take a ReadOnlyMany or ReadWriteMany claim',
    ),
    "two sources": (
        changed(GROUP, "models.m.source.path", "/m"),
        "models.m.source: give exactly one of url, claim, image and path, not claim and path",
    ),
    "no source": (changed(GROUP, "models.m.source", {}), "models.m.source: give exactly one of url, claim, image and path, not none"),
    "a download of unknown bytes": (
        changed(GROUP, "models.m.source", {"url": "https://models.example.com/m"}),
        "models.m.source.files: url needs it; give each file's SHA-256",
    ),
    "a cache of nothing": (
        changed(GROUP, "models.m.source.cache", {"storageClassName": "fast"}),
        "models.m.source.cache: only goes with url; remove it, or give url",
    ),
    "a model that does not fit": (
        changed(changed(GROUP, "worker.groups.g.gpuMemoryGib", 16), "worker.groups.g.kvCacheGib", 4),
        "worker.groups.g.gpuMemoryGib: weights, kvCacheGib and 1.5 GiB of room take 18.5 GiB of each GPU, which has 16; take more gpus",
    ),
    "a digest that is none": (changed(GROUP, "models.m.source", {**URL, "files": {"config.json": "abc"}}), "does not match pattern"),
    "a file outside of the folder": (
        changed(GROUP, "models.m.source", {**URL, "files": {"../config.json": "0" * 64}}),
        "does not match pattern",
    ),
    "a stream longer than any drain": ({"longestStreamS": 7200}, "at '/longestStreamS': maximum: got 7,200, want 3,600"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_by_key_and_cure(case: str) -> None:
    values, sentence = REFUSED[case]
    assert sentence in refusal(values)


def test_every_refusal_of_the_templates_is_tested() -> None:
    """What each `fail` says between its placeholders stands in the refusal of some case."""
    said = "\n".join(refusal(values) for values, _ in REFUSED.values())
    sentences = re.findall(r'fail \(?(?:printf )?"((?:[^"\\]|\\.)*)"', (CHART / "templates/_checks.tpl").read_text())
    assert len(sentences) > 20
    for sentence in sentences:
        for part in re.split(r"%(?:\.1f|[sdvq])", sentence):
            assert part in said, sentence


def test_zero_and_false_override_defaults() -> None:
    values = changed(changed(GROUP, "worker.groups.g.gpus", 0), "worker.groupDefaults.autoscaling", {"enabled": True, "kind": "hpa"})
    values = changed(values, "worker.groups.g.autoscaling", {"enabled": False})
    deployment = next(one for one in render(values) if one["metadata"]["name"].endswith("worker-g"))
    assert deployment["spec"]["replicas"] == 1
    assert "nvidia.com/gpu" not in deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_examples_stand_alone() -> None:
    for name in EXAMPLES:
        assert render(example(name))
