"""Test the Helm chart, rendered by Helm and checked against Kubernetes' schemas; no cluster is needed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from bertqa.cli.command import parse
from bertqa.triton_config import Serving
from engine_builder.commands import BuildArguments
from service.commands.serve import ServeOptions
from service.observability.metrics import Metrics
from service.runtime import triton as triton_command
from service.runtime.triton_process import FLAGS
from service.settings import Settings
from service.triton.admin import CALLS_PER_WINDOW
from tests.support.paths import ROOT

CHART = ROOT / "deploy" / "helm" / "bertqa"
# pragma: allowlist nextline secret
STORAGE = {"claim": "", "objectStorage": {"source": ":s3,env_auth:bucket/models", "secret": "keys"}}
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "storage": {"models": STORAGE},
    "gpu": {
        "target": "tensorrt",
        "models": {"claim": "engines", "create": {"enabled": True, "storageClass": "nfs"}},
        "build": {
            "enabled": True,
            "checkpoint": "/checkpoints/minilm-l6-squad",
            "checkpointsClaim": "checkpoints",
            "arguments": ["--activate"],
        },
        "images": {"registry": "registry.example/team", "tag": "1.2.3", "pullSecrets": ["login"]},
        "service": {
            "autoscaling": {"metric": "in-flight", "target": 8},
            "nodeSelector": {"disk": "ssd"},
            "environment": {"BERTQA_METRICS": "key", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"},
            "keysSecret": "keys",  # pragma: allowlist secret
        },
        "triton": {
            "gpus": 2,
            "autoscaling": {"enabled": True},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        },
        "console": {"enabled": True},
        # pragma: allowlist nextline secret
        "ingress": {"enabled": True, "className": "nginx", "host": "qa.example", "tlsSecret": "tls"},
        "networkPolicy": {
            "clients": [{"podSelector": {}}],
            "monitoring": [{"namespaceSelector": {}}],
            "egress": [{"ports": [{"protocol": "TCP", "port": 4317}], "to": [{"namespaceSelector": {}}]}],
        },
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    },
    "still": {
        "service": {"autoscaling": {"enabled": False}, "replicas": 3},
        "networkPolicy": {"enabled": False},
        "build": {"enabled": True, "checkpoint": "deepset/bert-base-cased-squad2"},
        "triton": {"replicas": 0},
    },
}
OURS = "monitoring.coreos.com/v1"  # the Prometheus operator's; its schema is not among Kubernetes' own


class HelmError(Exception):
    pass


def helm(call: str, values: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tests" / "support" / "helm_process.py"), call, str(CHART)]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise HelmError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def manifests(values: dict[str, Any]) -> list[dict[str, Any]]:
    texts = [text for path, text in helm("render", values).items() if path.endswith(".yaml")]
    return [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]


def of_kind(found: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [manifest for manifest in found if manifest["kind"] in kinds]


def pods(found: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Component, labels and specification of every pod that the release makes."""
    for manifest in of_kind(found, "Deployment", "Job"):
        template = manifest["spec"]["template"]
        yield (
            template["metadata"]["labels"]["app.kubernetes.io/component"],
            template["metadata"]["labels"],
            template["spec"],
        )


@pytest.fixture(params=VALUES)
def release(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return manifests(VALUES[request.param])


@pytest.mark.parametrize("name", VALUES)
def test_helm_has_nothing_to_complain_of(name: str) -> None:
    report = helm("lint", VALUES[name])
    assert report["errors"] == []
    assert {message["error"] for message in report["messages"]} <= {"icon is recommended"}


@pytest.mark.parametrize("version", ["1.27", kubernetes_validate.latest_version()])
def test_kubernetes_takes_every_manifest(release: list[dict[str, Any]], version: str) -> None:
    for manifest in release:
        if manifest["apiVersion"] != OURS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_what_names_something_finds_it(release: list[dict[str, Any]]) -> None:
    every = {component: (labels, spec) for component, labels, spec in pods(release)}

    def selected(selector: dict[str, str]) -> list[dict[str, Any]]:
        found = [spec for labels, spec in every.values() if selector.items() <= labels.items()]
        assert found, f"nothing has {selector}"
        return found

    def ports(specs: list[dict[str, Any]]) -> set[str]:
        return {port["name"] for spec in specs for port in spec["containers"][0]["ports"]}

    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in release}
    services = {manifest["metadata"]["name"]: manifest for manifest in of_kind(release, "Service")}
    for manifest in services.values():
        assert {port["targetPort"] for port in manifest["spec"]["ports"]} <= ports(
            selected(manifest["spec"]["selector"])
        )
    for manifest in of_kind(release, "Deployment", "PodDisruptionBudget"):
        assert len(selected(manifest["spec"]["selector"]["matchLabels"])) == 1
    for manifest in of_kind(release, "HorizontalPodAutoscaler"):
        target = manifest["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in names
        (deployment,) = (each for each in of_kind(release, "Deployment") if each["metadata"]["name"] == target["name"])
        assert "replicas" not in deployment["spec"]  # or every upgrade would set it back
    for manifest in of_kind(release, "NetworkPolicy"):
        own = selected(manifest["spec"]["podSelector"]["matchLabels"])
        for rule in manifest["spec"]["ingress"]:
            assert {port["port"] for port in rule["ports"]} <= ports(own)
        for rule in manifest["spec"]["egress"]:
            for peer in rule.get("to", ()) if manifest["metadata"]["name"].endswith("-service") else ():
                if peer.get("podSelector"):
                    asked = selected(peer["podSelector"]["matchLabels"])[0]["containers"][0]["ports"]
                    assert {port["port"] for port in rule["ports"]} <= {port["containerPort"] for port in asked}
    for manifest in of_kind(release, "Ingress"):
        (path,) = manifest["spec"]["rules"][0]["http"]["paths"]
        backend = path["backend"]["service"]
        assert backend["port"]["name"] in {port["name"] for port in services[backend["name"]]["spec"]["ports"]}
    for manifest in of_kind(release, "ServiceMonitor"):
        wanted = manifest["spec"]["selector"]["matchLabels"]
        (service,) = (each for each in services.values() if wanted.items() <= each["metadata"]["labels"].items())
        (endpoint,) = manifest["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        assert service["metadata"]["labels"][manifest["spec"]["jobLabel"]] in ("service", "triton")
    for _, spec in every.values():
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in [*spec["containers"], *spec.get("initContainers", ())]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_pods_keep_the_restricted_standard(release: list[dict[str, Any]]) -> None:
    for component, _, spec in pods(release):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        for container in [*spec["containers"], *spec.get("initContainers", ())]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]
            assert ":" in container["image"].rpartition("/")[2]
        if component not in ("build", "console"):  # which serve nobody
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= spec["containers"][0].keys()


def test_programs_take_their_arguments(release: list[dict[str, Any]]) -> None:
    containers = {component: spec["containers"][0] for component, _, spec in pods(release)}
    args = parse(ServeOptions, containers["service"]["args"])
    assert args.triton_url
    environment = {variable["name"]: variable["value"] for variable in containers["service"]["env"]}
    settings = Settings.from_environment({**environment, "BERTQA_TRITON_URL": args.triton_url or ""})
    if settings.api_keys_file:
        (mount,) = (mount for mount in containers["service"]["volumeMounts"] if mount["name"] == "keys")
        assert str(Path(settings.api_keys_file).parent) == mount["mountPath"]
    (headless,) = (each for each in of_kind(release, "Service") if each["spec"].get("clusterIP") == "None")
    assert settings.triton_urls == (f"{headless['metadata']['name']}:8001",)
    assert (args.host, args.port, str(args.repository)) == ("0.0.0.0", 8000, "/models")
    triton = containers["triton"]
    if triton["args"][0] == "tritonserver":
        assert sorted(triton["args"][1:]) == sorted(["--model-repository=/models", *FLAGS])
    else:
        served = triton_command.parse_args(triton["args"])
        ports = {port["name"]: port["containerPort"] for port in triton["ports"]}
        assert ports == {"grpc": served.grpc_port, "metrics": served.metrics_port, "http": served.http_port}
        assert (served.host, str(served.repository)) == ("0.0.0.0", "/models")
    if "console" in containers:
        (claim,) = (mount for mount in containers["console"]["volumeMounts"] if mount["name"] == "models")
        assert "readOnly" not in claim
        variables = {variable["name"]: variable["value"] for variable in containers["console"]["env"]}
        assert Settings.from_environment(variables).triton_urls == settings.triton_urls
    if "build" in containers:
        built = parse(BuildArguments, containers["build"]["args"])
        assert built.target == ("tensorrt" if triton["args"][0] == "tritonserver" else "cpu")
        assert (str(built.repository), built.model) == ("/models", "bert_qa")


def test_images_are_those_of_the_compose_file() -> None:
    text = (ROOT / "docker-compose.yml").read_text().replace("${NGC_RELEASE:-26.06}", "26.06")
    images = {service["image"] for service in yaml.safe_load(text)["services"].values()}
    for target in ("cpu", "tensorrt"):
        for _, _, spec in pods(manifests({"target": target, "build": {"enabled": True, "checkpoint": "a"}})):
            assert spec["containers"][0]["image"] in images


def test_autoscalers_ask_for_metrics_that_the_adapter_offers() -> None:
    adapter = yaml.safe_load((ROOT / "deploy" / "helm" / "prometheus-adapter.yaml").read_text())
    offered = {rule["name"]["as"]: rule["seriesQuery"].partition("{")[0] for rule in adapter["rules"]["custom"]}
    scalers = of_kind(manifests(VALUES["gpu"]), "HorizontalPodAutoscaler")
    asked = {metric["pods"]["metric"]["name"] for scaler in scalers for metric in scaler["spec"]["metrics"]}
    assert asked == offered.keys() == set(offered.values())
    assert b"# TYPE bertqa_requests_in_flight gauge" in Metrics().text()  # Triton's is in test_deploy's scrapes


def test_with_a_claim_nothing_is_copied_and_without_one_each_pod_copies() -> None:
    for _, _, spec in pods(manifests({})):
        assert "initContainers" not in spec
        assert {"name": "models", "persistentVolumeClaim": {"claimName": "bertqa-models"}} in spec["volumes"]
    for _, _, spec in pods(manifests({"models": STORAGE})):
        (copy,) = spec["initContainers"]
        assert copy["args"][-2:] == [":s3,env_auth:bucket/models", "/models"]
        assert {"secretRef": {"name": "keys"}} in copy["envFrom"]
        assert {"name": "models", "emptyDir": {}} in spec["volumes"]


def test_an_engine_is_built_once_and_again_when_something_of_it_changes() -> None:
    build = {"enabled": True, "checkpoint": "a"}

    def made(**values: Any) -> tuple[str, dict[str, Any]]:
        (job,) = of_kind(manifests({"build": build, **values}), "Job")
        assert "ttlSecondsAfterFinished" not in job["spec"]  # a Job that is gone would be made again
        return job["metadata"]["name"], job["spec"]

    first = made()
    assert first == made(service={"replicas": 5}, images={"rclone": "rclone/rclone:1.0"})
    names = {first[0]}
    for values in (
        {"build": {**build, "checkpoint": "b"}},
        {"build": {**build, "arguments": ["--precision=fp32"]}},
        {"target": "tensorrt"},
        {"model": "large"},
        {"models": {"claim": "others"}},
        {"images": {"tag": "0.2.0"}},
        {"images": {"pullSecrets": ["login"]}},
        {"triton": {"nodeSelector": {"gpu": "h100"}}},
    ):
        name, spec = made(**values)
        assert spec != first[1]
        names.add(name)
    assert len(names) == 9


def test_deployments_wait_for_the_engine_that_is_being_built() -> None:
    for building in (True, False):
        for deployment in of_kind(manifests({"build": {"enabled": building, "checkpoint": "a"}}), "Deployment"):
            assert ("progressDeadlineSeconds" in deployment["spec"]) is building


def test_a_queue_that_two_services_can_make_is_enough_for_another_triton() -> None:
    """In-flight calls are bounded, so that a target could be one that no queue ever reaches."""
    (triton,) = of_kind(
        manifests({"triton": {"autoscaling": {"enabled": True}}, "service": {"autoscaling": {"enabled": False}}}),
        "HorizontalPodAutoscaler",
    )
    services, engines = 2, Serving(active=1, loaded=(1,)).instances
    longest_queue = (services * CALLS_PER_WINDOW - 1) * engines
    assert int(triton["spec"]["metrics"][0]["pods"]["target"]["averageValue"]) <= longest_queue / 2


@pytest.mark.parametrize("components", [["service"], ["service", "console"]])
def test_nobody_but_the_service_reaches_triton(components: list[str]) -> None:
    values = {"console": {"enabled": "console" in components}}
    (policy,) = (
        manifest
        for manifest in of_kind(manifests(values), "NetworkPolicy")
        if manifest["metadata"]["name"].endswith("-triton")
    )
    rules = {rule["ports"][0]["port"]: rule.get("from") for rule in policy["spec"]["ingress"]}
    assert rules.keys() == {"grpc", "metrics"}
    assert [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in rules["grpc"]] == components
    assert policy["spec"]["egress"] == []


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"target": "gpu"}, "/target"),
        ({"replicas": 3}, "replicas"),
        ({"service": {"replicas": 0}}, "/service/replicas"),
        ({"service": {"environment": {"BERTQA_TRITON_URL": "x"}}}, "BERTQA_TRITON_URL"),
        ({"service": {"environment": {"DEADLINE": "x"}}}, "DEADLINE"),
        ({"service": {"autoscaling": {"metric": "requests"}}}, "/service/autoscaling/metric"),
        ({"models": {"claim": ""}}, "/models"),
        ({"models": {"objectStorage": {"source": ":s3:b"}}}, "/models"),
        ({"images": {"tag": "latest"}}, "/images/tag"),
        ({"images": {"triton": "nvcr.io/nvidia/tritonserver"}}, "/images/triton"),
        ({"ingress": {"enabled": True}}, "/ingress/host"),
        ({"build": {"enabled": True}}, "/build/checkpoint"),
        ({"models": STORAGE, "build": {"enabled": True, "checkpoint": "a"}}, "models.claim"),
        ({"models": STORAGE, "console": {"enabled": True}}, "models.claim"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(HelmError, match=named):
        manifests(values)
