"""Random values of the chart that go together, for properties that hold for all of them."""

from hypothesis import strategies as st

from tests.deploy.chart import Values

NAMES = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
DIGESTS = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
POD = st.fixed_dictionaries(
    {},
    optional={
        "nodeSelector": st.dictionaries(NAMES, NAMES, max_size=2),
        "tolerations": st.dictionaries(NAMES, st.just({"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}), max_size=2),
        "annotations": st.dictionaries(NAMES, NAMES, max_size=2),
        "priorityClassName": NAMES,
    },
)


def is_of_one_pod(mode: str) -> bool:
    return mode.startswith("ReadWriteOnce")


@st.composite
def claims(draw: st.DrawFn, number: int, modes: tuple[str, ...]) -> Values:
    return {"name": f"claim-{number}", "accessMode": draw(st.sampled_from(modes))}


@st.composite
def sources(draw: st.DrawFn, number: int, modes: tuple[str, ...]) -> Values:
    match draw(st.sampled_from(["url", "claim", "image", "path"])):
        case "claim":
            return {"claim": {**draw(claims(number, modes)), **draw(st.sampled_from([{}, {"subPath": "original"}]))}}
        case "image":
            return {"image": {"reference": "registry.example.com/model:1"}}
        case "path":
            return {"path": "/opt/ossia/models/m"}
    source: Values = {
        "url": draw(st.sampled_from(["https://models.example.com/m", "http://minio:9000/m", "s3://bucket/m"])),
        "files": draw(st.dictionaries(st.sampled_from(["config.json", "a/model.safetensors"]), DIGESTS, min_size=1)),
    }
    if draw(st.booleans()):
        source["existingSecret"] = "store"
    if source["url"].startswith("s3"):
        source |= draw(st.sampled_from([{}, {"s3Endpoint": "http://minio.storage:9000", "s3Region": "eu-west-1"}]))
    match draw(st.sampled_from(["none", "claim", "class"])):
        case "claim":
            source["cache"] = {"claim": draw(claims(number, modes))}
        case "class":
            source["cache"] = {"storageClassName": draw(st.sampled_from(["", "fast"]))}
    return source


@st.composite
def groups_and_models(draw: st.DrawFn) -> Values:
    """Each group has a model of its own, so that a claim for one pod has one."""
    groups: Values = {}
    models: Values = {}
    for number, name in enumerate(draw(st.lists(NAMES, max_size=3, unique=True))):
        scaling = draw(st.sampled_from(["off", "keda", "hpa"]))
        replicas = draw(st.integers(1, 4))
        groups[name] = {
            "model": f"m{number}",
            "gpus": draw(st.sampled_from([0, 1, 2, 4, 8])),
            "replicas": replicas,
            "kvCacheGib": draw(st.sampled_from([0.5, 1, 24])),
            "autoscaling": {"enabled": scaling != "off", "kind": "hpa" if scaling == "hpa" else "keda"},
            "pod": draw(POD),
        }
        one_pod = scaling == "off" and replicas == 1
        modes = ("ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod") if one_pod else ("ReadOnlyMany", "ReadWriteMany")
        offer = {"aliases": {f"alias-{number}": True}, "price": {"input": 0.1, "output": 0.5}}
        models[f"m{number}"] = {
            "sizeGib": draw(st.sampled_from([0.1, 12.8, 60.8])),
            "source": draw(sources(number, modes)),
            **draw(st.sampled_from([{}, offer])),
        }
    return {"worker": {"groups": groups}, "models": models}


@st.composite
def chart_values(draw: st.DrawFn) -> Values:
    values = draw(groups_and_models())
    values |= {
        "fullnameOverride": draw(st.sampled_from(["", "a", "a-name-of-thirty-characters-123"[:30]])),
        "longestStreamS": draw(st.integers(1, 3600)),
        "endpointDelayS": draw(st.integers(1, 300)),
        "ipFamily": draw(st.sampled_from(["IPv4", "IPv6"])),
        "cluster": draw(st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True)),
        "image": {"pullSecrets": draw(st.dictionaries(NAMES, st.booleans(), max_size=2))},
        "scheduler": {"replicas": draw(st.integers(1, 5)), "maxQueuedTokens": draw(st.integers(1, 2**40)), "pod": draw(POD)},
        "networkPolicy": {
            "enabled": draw(st.booleans()),
            "clients": {"apps": draw(st.sampled_from([{}, {"namespace": "apps"}, {"cidr": "10.0.0.0/8"}]))},
        },
        "observability": {
            "prometheusAddress": "http://prometheus:9090",
            "otlpEndpoint": draw(st.sampled_from(["", "http://otel:4317"])),
            "monitors": {"enabled": draw(st.booleans())},
        },
        "auth": draw(
            st.sampled_from(
                [
                    {"allowAnonymous": True},
                    {"apiKeys": {"existingSecret": "keys"}},
                    {
                        "jwt": {"existingSecret": "jwt", "issuer": "i", "audience": "a"},
                        "denyAddresses": {"10.1.0.0/16": True, "10.2.0.0/16": False},
                    },
                    {"jwt": {"jwksUrl": "https://login/keys", "issuer": "i", "audience": "a"}, "apiKeys": {"existingSecret": "keys"}},
                ]
            )
        ),
        "etcd": draw(
            st.sampled_from(
                [
                    {"bundled": {"storageGib": 4}},
                    {"bundled": {"enabled": False}, "external": {"endpoints": {"e0.infra": 2379, "e1.infra": 2380}}},
                    {
                        "bundled": {"enabled": False},
                        "external": {"endpoints": {"e0.infra": 2379}, "tls": True, "existingSecret": "etcd-client"},
                    },
                ]
            )
        ),
        "redis": draw(
            st.sampled_from([{}, {"bundled": {"enabled": False}}, {"bundled": {"enabled": False}, "external": {"existingSecret": "redis"}}])
        ),
        "tls": draw(
            st.sampled_from(
                [
                    {},
                    {"enabled": True, "certManager": {"issuerName": "ca"}},
                    {"enabled": True, "existingSecrets": {role: f"{role}-certificate" for role in ("edge", "scheduler", "worker", "etcd")}},
                ]
            )
        ),
        "edge": {
            "replicas": draw(st.integers(1, 9)),
            "maxBodyBytes": draw(st.integers(1024, 2**30)),
            "tlsSecret": draw(st.sampled_from(["", "door"])),
            "autoscaling": {"enabled": draw(st.booleans())},
            "ingress": draw(st.sampled_from([{}, {"enabled": True, "host": "api.example.com", "tlsSecret": "api"}])),
            "gateway": draw(st.sampled_from([{}, {"enabled": True, "parents": {"public": {}}, "hostnames": {"api.example.com": True}}])),
            "pod": draw(POD),
        },
    }
    return values
