"""What holds for every rendering of the chart, whatever the values."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings

from edge.config import EdgeConfig
from scheduler.config import SchedulerConfig
from services.config import ProcessConfig, load_config
from tests.deploy.chart import NAMESPACE, Manifest, Values, containers, matches, of_kind, pod_specs, render
from tests.deploy.chart_values import chart_values, is_of_one_pod
from worker.config import WorkerConfig

CONFIGS: dict[str, type[ProcessConfig]] = {"edge": EdgeConfig, "scheduler": SchedulerConfig, "worker": WorkerConfig}
WORKLOADS = ("Deployment", "StatefulSet", "Job")
FLOWS = {  # who may open a connection to whom: the design's picture, with the stores that it names
    ("clients", "edge"),
    ("test", "edge"),
    ("edge", "scheduler"),
    ("scheduler", "worker"),
    *((process, "etcd") for process in CONFIGS),
    ("edge", "redis"),
}
for_all_values = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def labels(workload: Manifest) -> Mapping[str, str]:
    found: Mapping[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return found


@for_all_values
@given(chart_values())
def test_selectors_match_the_labels_they_mean(values: Values) -> None:
    manifests = render(values)
    workloads = of_kind(manifests, "Deployment", "StatefulSet")
    for one, other in itertools.product(workloads, workloads):
        assert matches(one["spec"]["selector"]["matchLabels"], labels(other)) == (one is other)
    pods = [labels(one) for one in of_kind(manifests, *WORKLOADS)]
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert sum(matches(budget["spec"]["selector"]["matchLabels"], one) for one in pods) == 1
    for service in of_kind(manifests, "Service"):
        assert sum(matches(service["spec"]["selector"], one) for one in pods) == 1
    for monitor in of_kind(manifests, "ServiceMonitor"):
        selected = [
            one for one in of_kind(manifests, "Service") if matches(monitor["spec"]["selector"]["matchLabels"], one["metadata"]["labels"])
        ]
        assert [{port["name"] for port in one["spec"]["ports"]} >= {"metrics"} for one in selected] == [True]
    for monitor in of_kind(manifests, "PodMonitor"):
        scraped = [one for one in of_kind(manifests, *WORKLOADS) if matches(monitor["spec"]["selector"]["matchLabels"], labels(one))]
        ports = [port["name"] for one in scraped for port in one["spec"]["template"]["spec"]["containers"][0]["ports"]]
        assert ports.count("metrics") == len(scraped)
    for policy in of_kind(manifests, "NetworkPolicy"):
        assert any(matches(policy["spec"]["podSelector"]["matchLabels"], one) for one in pods)
    for workload in of_kind(manifests, *WORKLOADS):
        spreads = workload["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert all(matches(spread["labelSelector"]["matchLabels"], labels(workload)) for spread in spreads)


@for_all_values
@given(chart_values())
def test_every_port_is_named_once_and_found_by_its_name(values: Values) -> None:
    manifests = render(values)
    for spec in pod_specs(manifests).values():
        ports = [port for container in spec["containers"] for port in container.get("ports", ())]
        assert all(count == 1 for count in Counter(port["name"] for port in ports).values())
        assert all(count == 1 for count in Counter(port["containerPort"] for port in ports).values())
        for container in spec["containers"]:
            probes = [container[probe] for probe in ("startupProbe", "livenessProbe", "readinessProbe") if probe in container]
            named = {port["name"] for port in container.get("ports", ())}
            assert all((probe.get("httpGet") or probe["tcpSocket"])["port"] in named for probe in probes)
    for one, policy_port in [*service_ports(manifests), *policy_ports(manifests)]:
        assert policy_port in {port for container in one["spec"]["template"]["spec"]["containers"] for port in numbers_and_names(container)}


@for_all_values
@given(chart_values())
def test_metrics_are_open_to_monitoring_only(values: Values) -> None:
    """Not on the Service that may be a load balancer, and not to the clients that a policy names."""
    manifests = render(values)
    (edge,) = (one for one in of_kind(manifests, "Service") if one["metadata"]["name"].endswith("-edge"))
    assert {port["name"] for port in edge["spec"]["ports"]} == {"rest", "grpc"}
    for policy in of_kind(manifests, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            if {"port": "metrics"} in rule["ports"]:
                assert [list(peer) for peer in rule["from"]] == [["namespaceSelector"]]


def numbers_and_names(container: Manifest) -> set[object]:
    return {value for port in container.get("ports", ()) for value in (port["name"], port["containerPort"])}


def selected(manifests: list[Manifest], selector: Mapping[str, str]) -> list[Manifest]:
    return [one for one in of_kind(manifests, *WORKLOADS) if matches(selector, labels(one))]


def service_ports(manifests: list[Manifest]) -> Iterator[tuple[Manifest, object]]:
    for service in of_kind(manifests, "Service"):
        for one in selected(manifests, service["spec"]["selector"]):
            yield from ((one, port["targetPort"]) for port in service["spec"]["ports"])


def policy_ports(manifests: list[Manifest]) -> Iterator[tuple[Manifest, object]]:
    """Ports that a policy opens into pods that it names one by one."""
    for policy in of_kind(manifests, "NetworkPolicy"):
        chosen = selected(manifests, policy["spec"]["podSelector"]["matchLabels"])
        for rule in policy["spec"].get("ingress", ()) if len({labels(one)["app.kubernetes.io/component"] for one in chosen}) == 1 else ():
            yield from ((one, port["port"]) for one in chosen for port in rule["ports"])
        for rule in policy["spec"].get("egress", ()):
            for peer in rule.get("to", ()):
                reached = selected(manifests, peer["podSelector"]["matchLabels"])
                assert reached
                yield from ((one, port["port"]) for one in reached for port in rule["ports"])


@for_all_values
@given(chart_values())
def test_secrets_are_files_and_every_volume_is_mounted(values: Values) -> None:
    manifests = render(values)
    for container in containers(manifests):
        assert "envFrom" not in container
        assert not [one for one in container.get("env", ()) if "secretKeyRef" in one.get("valueFrom", {})]
    for name, spec in pod_specs(manifests).items():
        every = [*spec["containers"], *spec.get("initContainers", ())]
        mounts = [mount for container in every for mount in container.get("volumeMounts", ())]
        volumes = {one["name"]: one for one in spec.get("volumes", ())}
        templates = {"data"} if name.startswith("StatefulSet") else set()
        assert {mount["name"] for mount in mounts} == volumes.keys() | templates
        for mount in mounts:
            if {"secret", "configMap"} & volumes.get(mount["name"], {}).keys():
                assert mount["readOnly"] is True
        for container in every:
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
            assert len(set(paths)) == len(paths)


@for_all_values
@given(chart_values())
def test_no_two_pods_share_a_claim_of_one(values: Values) -> None:
    manifests = render(values)
    modes = {
        claim["name"]: claim["accessMode"]
        for model in values["models"].values()
        for claim in (model["source"].get("claim"), model["source"].get("cache", {}).get("claim"))
        if claim
    }
    most = {
        one["spec"]["scaleTargetRef"]["name"]: most_replicas(one) for one in of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject")
    }
    users: Counter[str] = Counter()
    for one in of_kind(manifests, "Deployment"):
        for volume in one["spec"]["template"]["spec"].get("volumes", ()):
            if claim := volume.get("persistentVolumeClaim"):
                users[claim["claimName"]] += most.get(one["metadata"]["name"]) or one["spec"]["replicas"]
    assert users.keys() == modes.keys() or not values["worker"]["groups"]
    assert all(users[name] == 1 for name, mode in modes.items() if is_of_one_pod(mode))


def most_replicas(scaler: Manifest) -> int:
    return int(scaler["spec"].get("maxReplicas") or scaler["spec"]["maxReplicaCount"])


@for_all_values
@given(chart_values())
def test_grace_outlasts_the_longest_stream(values: Values) -> None:
    for one in of_kind(render(values), "Deployment"):
        spec = one["spec"]["template"]["spec"]
        process, main = spec["containers"][0]["name"], spec["containers"][0]
        if process not in CONFIGS:
            continue
        pre_stop = main.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drain = float(environment(main)[f"OSSIA_{process.upper()}_DRAIN_S"])
        assert pre_stop == (values["endpointDelayS"] if process == "edge" else 0)
        assert drain >= values["longestStreamS"]
        assert spec["terminationGracePeriodSeconds"] > pre_stop + drain


@for_all_values
@given(chart_values())
def test_names_are_unique_short_and_scaled_pods_have_no_number(values: Values) -> None:
    manifests = render(values)
    names = Counter((one["kind"], one["metadata"]["name"]) for one in manifests)
    assert set(names.values()) == {1}
    assert all(len(name) <= 63 for _, name in names)
    assert {one["metadata"]["namespace"] for one in manifests} == {NAMESPACE}
    deployments = {one["metadata"]["name"]: one for one in of_kind(manifests, "Deployment")}
    scaled = {one["spec"]["scaleTargetRef"]["name"] for one in of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject")}
    assert scaled <= deployments.keys()
    assert {name for name, one in deployments.items() if "replicas" not in one["spec"]} == scaled


def environment(container: Manifest, **facts: str) -> dict[str, str]:
    """What the process sees, with the pod's own facts in the place of $(NAMES)."""
    found = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    for name, fact in facts.items():
        found = {key: value.replace(f"$({name})", fact) for key, value in found.items()}
    assert not [value for value in found.values() if facts and "$(" in value]
    return found


@for_all_values
@given(chart_values())
def test_processes_take_the_settings_that_the_chart_gives(values: Values) -> None:
    ip = "fd00::7" if values["ipFamily"] == "IPv6" else "10.0.0.7"
    started = Counter[str]()
    for container in containers(render(values)):
        if container["name"] not in CONFIGS:
            continue
        kind, prefix = CONFIGS[container["name"]], f"OSSIA_{container['name'].upper()}_"
        given_env = environment(container, POD_IP=ip, POD_NAME="demo-ossia-pod-abc")
        named = {name.removeprefix(prefix).lower() for name in given_env if name.startswith(prefix)}
        assert named <= kind.model_fields.keys()
        with patch.dict(os.environ, {name: value for name, value in given_env.items() if name != "OSSIA_SECRETS_DIR"}, clear=True):
            config = load_config(kind, [])
        assert config.model_fields_set >= named
        assert config.drain_s == values["longestStreamS"]
        started[container["name"]] += 1
        if isinstance(config, WorkerConfig):
            config.check()
    assert started.keys() == CONFIGS.keys()


@for_all_values
@given(chart_values())
def test_traffic_is_denied_but_for_the_flows_of_the_design(values: Values) -> None:
    policies = of_kind(render(values), "NetworkPolicy")
    assert bool(policies) == values["networkPolicy"]["enabled"]
    if not policies:
        return
    deny = next(one for one in policies if one["metadata"]["name"].endswith("-deny"))["spec"]
    assert deny["policyTypes"] == ["Ingress", "Egress"] and not {"ingress", "egress"} & deny.keys()
    flows = set()
    for policy in policies:
        here = policy["spec"]["podSelector"]["matchLabels"].get("app.kubernetes.io/component")
        if here is None:
            continue
        for rule in policy["spec"].get("ingress", ()):
            flows |= {(component(peer) or "clients", here) for peer in rule["from"]}
        for rule in policy["spec"].get("egress", ()):
            flows |= {(here, component(peer)) for peer in rule.get("to", ())}
            assert rule.get("to") or rule["ports"], "a rule without peers names its ports"
    assert flows <= FLOWS
    assert flows >= {("clients", "edge"), ("edge", "scheduler"), ("scheduler", "worker")}


def component(peer: Manifest) -> str | None:
    found: str | None = peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component")
    return found


@for_all_values
@given(chart_values())
def test_every_pod_is_restricted(values: Values) -> None:
    """Kubernetes' Pod Security Standard `restricted`, and a read-only root and no token on top."""
    for spec in pod_specs(render(values)).values():
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & spec.keys()
        allowed = {"configMap", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "secret"}
        assert all(volume.keys() - {"name"} <= allowed for volume in spec.get("volumes", ()))
        for container in [*spec["containers"], *spec.get("initContainers", ())]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not [port for port in container.get("ports", ()) if "hostPort" in port]
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
