"""The Kubernetes manifests, rendered: taken by the schemas, and by rules that are shown to bite.

`kubectl` renders them; no cluster is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.config_file import load
from tests.deploy.cluster_rules import OUTSIDE, RULES, may_call
from tests.deploy.manifests import K8S, SETTINGS, Manifest, clusters, manifests, name_of, of, pods
from tests.deploy.schemas import misshapen

GONE = object()
ANOTHER = 12345  # a port that nobody names
API, TEACHER = "Deployment/potstill-api", "Deployment/potstill-teacher"
RAY, JOB = "RayCluster/potstill-ray", "RayJob/potstill-run"
POD, HEAD, WORKER = "spec.template.spec", "spec.headGroupSpec.template.spec", "spec.workerGroupSpecs.0.template.spec"
IN_JOB = "spec.rayClusterSpec.headGroupSpec.template.spec"

LITERAL_TOKEN = {"name": "RAY_AUTH_TOKEN", "value": "made up"}
INIT = [{"name": "prepare", "image": "busybox:1.37.0"}]
OPEN_INGRESS = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "Ingress",
    "metadata": {"name": "ray", "namespace": "potstill"},
    "spec": {"defaultBackend": {"service": {"name": "potstill-ray-head-svc", "port": {"number": 8265}}}},
}
SECRET = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "potstill"}, "stringData": {}}

Change = tuple[str, str, str, Any]  # rule, manifest, place, value

CHANGES: Sequence[Change] = (
    ("confined", API, f"{POD}.securityContext.runAsNonRoot", GONE),
    ("confined", API, f"{POD}.securityContext.runAsUser", 0),
    ("confined", API, f"{POD}.securityContext.seccompProfile.type", "Unconfined"),
    ("confined", API, f"{POD}.containers.0.securityContext.allowPrivilegeEscalation", GONE),
    ("confined", API, f"{POD}.containers.0.securityContext.capabilities.add", ["NET_ADMIN"]),
    ("confined", API, f"{POD}.containers.0.securityContext.runAsUser", 0),
    ("confined", API, f"{POD}.containers.0.ports.0.hostPort", 8000),
    ("confined", TEACHER, f"{POD}.containers.0.securityContext", GONE),
    ("confined", TEACHER, f"{POD}.hostNetwork", True),
    ("confined", TEACHER, f"{POD}.hostPID", True),
    ("confined", TEACHER, f"{POD}.initContainers", INIT),
    ("confined", RAY, f"{HEAD}.automountServiceAccountToken", GONE),
    ("confined", RAY, f"{HEAD}.volumes.0", {"name": "runs", "hostPath": {"path": "/"}}),
    ("confined", RAY, f"{WORKER}.containers.0.securityContext.privileged", True),
    ("confined", RAY, f"{WORKER}.containers.0.securityContext.readOnlyRootFilesystem", False),
    ("confined", JOB, f"{IN_JOB}.hostIPC", True),
    ("bounded", API, f"{POD}.containers.0.resources.limits.memory", GONE),
    ("bounded", RAY, f"{HEAD}.containers.0.resources", GONE),
    ("bounded", RAY, f"{WORKER}.containers.0.resources.requests.cpu", GONE),
    ("bounded", API, f"{POD}.volumes.3.emptyDir", {}),
    ("probed", API, f"{POD}.containers.0.livenessProbe", GONE),
    ("probed", TEACHER, f"{POD}.containers.0.readinessProbe.httpGet.path", "/livez"),
    ("pinned", API, f"{POD}.containers.0.image", "potstill-control:latest"),
    ("pinned", TEACHER, f"{POD}.containers.0.image", "potstill-cpu"),
    ("pinned", RAY, f"{WORKER}.containers.0.image", "potstill-cpu:stable"),
    ("secretive", API, f"{POD}.containers.0.env.0", {"name": "POTSTILL_DATABASE", "value": "sqlite:////runs/x.db"}),
    ("secretive", API, f"{POD}.containers.0.args.1", "--database=postgresql://a:b@c/d"),
    ("secretive", RAY, f"{WORKER}.containers.0.env.1", LITERAL_TOKEN),
    ("secretive", "ConfigMap/potstill-run", "data.api_token", "made up"),
    ("secretive", RAY, "spec.gcsFaultToleranceOptions.redisPassword.value", "made up"),
    ("complete", RAY, "spec.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef", {"name": "r", "key": "k"}),
    ("authenticated", RAY, "spec.authOptions", GONE),
    ("authenticated", RAY, "spec.authOptions.mode", "disabled"),
    ("authenticated", RAY, f"{WORKER}.containers.0.env.0.value", "disabled"),
    ("authenticated", RAY, f"{HEAD}.containers.0.env", GONE),
    ("authenticated", API, f"{POD}.containers.0.env.3", GONE),
    ("authenticated", JOB, "spec.rayClusterSpec.authOptions.secretName", "another"),
    ("no_development", TEACHER, f"{POD}.containers.0.env", [{"name": "VLLM_SERVER_DEV_MODE", "value": "1"}]),
    ("unexposed", RAY, "spec.headGroupSpec.serviceType", "LoadBalancer"),
    ("unexposed", RAY, "spec.headGroupSpec.serviceType", GONE),
    ("unexposed", RAY, "spec.headGroupSpec.enableIngress", True),
    ("unexposed", "Service/potstill-api", "spec.type", "NodePort"),
    ("walled", "NetworkPolicy/deny-by-default", "spec.policyTypes", ["Ingress"]),
    ("walled", "NetworkPolicy/deny-by-default", "spec.ingress", [{}]),
    ("walled", "NetworkPolicy/api", "spec.ingress.0.from", GONE),
    ("walled", "NetworkPolicy/api", "spec.ingress.1.ports.0.port", 9091),
    ("walled", "NetworkPolicy/api", "spec.egress.2.to", [{"ipBlock": {"cidr": "0.0.0.0/0"}}]),
    ("walled", "NetworkPolicy/teacher", "spec.ingress.0.from", [{"namespaceSelector": {}}]),
    ("walled", TEACHER, f"{POD}.containers.0.ports.1", {"name": "debug", "containerPort": 5678}),
    ("complete", API, f"{POD}.containers.0.env.0.valueFrom.secretKeyRef.key", "uri"),
    ("complete", API, f"{POD}.serviceAccountName", "default"),
    ("complete", API, f"{POD}.containers.0.volumeMounts.0.name", "run"),
    ("complete", RAY, f"{HEAD}.volumes.0.persistentVolumeClaim.claimName", "potstill-run"),
    ("complete", RAY, f"{WORKER}.volumes.2.secret.secretName", "potstill-teachers"),
    ("complete", JOB, f"{IN_JOB}.volumes.2.configMap.name", "potstill-config"),
    ("joined", API, "spec.selector.matchLabels", {"app.kubernetes.io/component": "service"}),
    ("joined", "Service/potstill-teacher", "spec.selector", {"app.kubernetes.io/component": "tutor"}),
    ("joined", "Service/potstill-api", "spec.ports.1.targetPort", "admin"),
    ("joined", "PodDisruptionBudget/potstill-api", "spec.selector.matchLabels", {"app.kubernetes.io/component": "x"}),
    ("joined", "NetworkPolicy/head", "spec.podSelector.matchLabels", {"app.kubernetes.io/component": "head"}),
    (
        "joined",
        "NetworkPolicy/head",
        "spec.egress.0.to.0.podSelector.matchLabels",
        {"app.kubernetes.io/component": "x"},
    ),
    ("joined", "HorizontalPodAutoscaler/potstill-teacher", "spec.scaleTargetRef.name", "potstill-api-2"),
    ("joined", "ServiceMonitor/potstill-api", "spec.endpoints.0.port", "admin"),
    ("commanded", API, f"{POD}.containers.0.args.1", "--hots=0.0.0.0"),
    ("commanded", TEACHER, f"{POD}.containers.0.args.8", "--thread-count=4"),
    ("commanded", JOB, "spec.entrypoint", "potstill rnu /etc/potstill/run.toml"),
)

MISSHAPEN: Sequence[tuple[str, str, Any]] = (
    (API, f"{POD}.containers.0.readOnlyRootFilesystem", True),
    (API, f"{POD}.containers.0.ports.0.containerPort", "8000"),
    (API, "spec.selector", GONE),
    ("NetworkPolicy/api", "spec.ingres", []),
    ("PersistentVolumeClaim/potstill-runs", "spec.accessModes", "ReadWriteMany"),
    (RAY, "spec.rayVerson", "2.60.0"),
    (RAY, "spec.workerGroupSpecs.0.maxReplicas", GONE),
    (RAY, "spec.headGroupSpec.rayStartParams.num-cpus", 0),
    (RAY, f"{WORKER}.containers.0.imagePull", "Always"),
    (RAY, f"{HEAD}.containers.0.env.0.value", True),
    (RAY, "spec.headGroupSpec.template", GONE),
    (RAY, "spec.gcsFaultToleranceOptions.redisAdress", "redis:6379"),
    (JOB, "spec.backoffLimit", "3"),
    (JOB, "spec.ttlSecondsAfterFinish", 60),
    ("ServiceMonitor/potstill-api", "spec.endpoints.0.interval", 15),
)


@pytest.fixture(params=SETTINGS)
def found(request: pytest.FixtureRequest) -> list[Manifest]:
    return manifests(request.param)


def test_every_manifest_has_the_shape_of_its_kind(found: list[Manifest]):
    assert list(misshapen(found)) == []


@pytest.mark.parametrize("rule", RULES)
def test_every_manifest_keeps_every_rule(found: list[Manifest], rule: str):
    assert list(RULES[rule](found)) == []


def test_everything_is_in_the_namespace(found: list[Manifest]):
    outside = [name_of(one) for one in found if one["metadata"].get("namespace") != "potstill"]
    assert outside == ["Namespace/potstill"]


@pytest.mark.parametrize("change", CHANGES, ids=[" ".join(change[:3]) for change in CHANGES])
def test_a_rule_bites(change: Change):
    rule, *what = change
    assert list(RULES[rule](changed(*what))) != []


@pytest.mark.parametrize(("rule", "manifest"), [("unexposed", OPEN_INGRESS), ("secretive", SECRET)])
def test_a_manifest_more_is_refused(rule: str, manifest: Manifest):
    assert list(RULES[rule]([*manifests("overlays/cpu"), manifest])) != []


def test_every_rule_is_shown_to_bite():
    assert {change[0] for change in CHANGES} == set(RULES)


@pytest.mark.parametrize(("name", "place", "value"), MISSHAPEN, ids=[" ".join(change[:2]) for change in MISSHAPEN])
def test_a_shape_that_no_api_server_takes_is_seen(name: str, place: str, value: Any):
    assert list(misshapen([one for one in changed(name, place, value) if name_of(one) == name])) != []


def changed(name: str, place: str, value: Any) -> list[Manifest]:
    """The manifests of the setting that has `name`, with `value` at `place` of it."""
    found = manifests("job" if name in (JOB, "ConfigMap/potstill-run") else "overlays/cpu")
    where: Any = next(one for one in found if name_of(one) == name)
    *path, last = place.split(".")
    for step in path:
        where = where[int(step)] if isinstance(where, list) else where.setdefault(step, {})
    if value is GONE:
        del where[int(last) if isinstance(where, list) else last]
    elif isinstance(where, list) and int(last) == len(where):
        where.append(value)
    else:
        where[int(last) if isinstance(where, list) else last] = value
    return found


# ------------------------------------------------------------------------------------------------ what ours are to do


def test_gpus_are_asked_for_where_the_overlay_says_so_and_nowhere_else():
    assert _gpus("overlays/gpu") == {f"{RAY} head": None, f"{RAY} workers": "4", TEACHER: "1", API: None}
    assert set(_gpus("overlays/cpu").values()) == {None}
    images = {pod.owner: pod.spec["containers"][0]["image"].split(":")[0] for pod in pods(manifests("overlays/gpu"))}
    assert images.pop(API) == "potstill-control"
    assert set(images.values()) == {"potstill-gpu"}  # the head too: its jobs import what their actors do


def _gpus(setting: str) -> Mapping[str, str | None]:
    asked = {}
    for pod in pods(manifests(setting)):
        resources = pod.spec["containers"][0]["resources"]
        asked[pod.owner] = resources["limits"].get("nvidia.com/gpu")
        assert resources["requests"].get("nvidia.com/gpu") == asked[pod.owner]  # Kubernetes takes no other
        tolerated = any(one["key"] == "nvidia.com/gpu" for one in pod.spec.get("tolerations", []))
        assert tolerated == (asked[pod.owner] is not None)
    return asked


def test_the_overlay_for_development_has_one_service_over_sqlite():
    found = manifests("overlays/dev")
    api = next(one for one in found if name_of(one) == API)
    assert (api["spec"]["replicas"], api["spec"]["strategy"]) == (1, {"type": "Recreate"})
    names = [variable["name"] for variable in api["spec"]["template"]["spec"]["containers"][0]["env"]]
    assert "POTSTILL_DATABASE" not in names
    assert "RAY_AUTH_TOKEN" in names
    assert of(found, "PodDisruptionBudget") == []
    assert {tuple(one["spec"]["accessModes"]) for one in of(found, "PersistentVolumeClaim")} == {("ReadWriteOnce",)}


def test_a_run_sees_its_folder_and_its_secrets_where_the_service_names_them():
    places = {}
    for pod in pods(manifests("overlays/cpu")):
        volumes = {one["name"]: one for one in pod.spec["volumes"]}
        mounts = pod.spec["containers"][0]["volumeMounts"]
        places[pod.owner] = {
            one["mountPath"]: {key: value for key, value in volumes[one["name"]].items() if key != "name"}
            for one in mounts
            if one["mountPath"] != "/tmp"  # noqa: S108 - each has its own
        }
    assert set(places[API]) == {"/runs", "/models", "/etc/potstill/secrets"}
    assert places[f"{RAY} head"] == places[f"{RAY} workers"] == places[API]


def test_the_service_calls_what_is_there():
    found = manifests("overlays/cpu")
    spec = next(one for one in found if name_of(one) == API)["spec"]["template"]["spec"]["containers"][0]
    variables = {one["name"]: one.get("value") for one in spec["env"]}
    ray = next(one for one in found if name_of(one) == RAY)["metadata"]["name"]
    assert variables["RAY_ADDRESS"] == f"http://{ray}-head-svc:8265"  # as KubeRay calls it
    services = {one["metadata"]["name"] for one in of(found, "Service")}
    assert variables["POTSTILL_TEACHERS"] in services
    assert "--report-url=http://potstill-api:8000" in spec["args"]
    assert "--allow-host=potstill-api" in spec["args"]
    assert "potstill-api" in services


def test_who_may_call_whom():
    found = manifests("overlays/cpu")
    everybody = {pod.labels["app.kubernetes.io/component"]: pod for pod in pods(found)}
    calls = {
        (caller, called, port)
        for caller in everybody
        for called in everybody
        for port in (6379, 8000, 8001, 8265, 9090, 10001, ANOTHER)
        if may_call(found, everybody[caller], everybody[called], port)
    }
    ray = {one for one in calls if {one[0], one[1]} <= {"ray-head", "ray-worker"}}
    assert {one[:2] for one in ray if one[2] == ANOTHER} == {one[:2] for one in ray}
    assert len(ray) == 4 * 7
    assert calls - ray == {
        ("api", "ray-head", 8265),
        ("api", "teacher", 8001),
        ("ray-head", "api", 8000),
        ("ray-head", "teacher", 8001),
        ("ray-worker", "teacher", 8001),
    }


def test_who_may_call_from_other_namespaces():
    calls = set()
    for policy in of(manifests("overlays/cpu"), "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            for peer in rule["from"]:
                if "namespaceSelector" in peer:
                    (who,) = {**peer["namespaceSelector"], **peer.get("podSelector", {})}["matchLabels"].values()
                    (whom,) = policy["spec"]["podSelector"]["matchLabels"].values()
                    calls |= {(who, whom, port["port"]) for port in rule["ports"]}
    assert calls == {
        ("ingress-nginx", "api", 8000),
        ("monitoring", "api", 9090),
        ("monitoring", "teacher", 8001),
        ("kuberay-operator", "ray-head", 8265),
    }


def test_a_head_whose_state_lasts_reaches_the_redis_that_keeps_it():
    found = manifests("overlays/lasting")
    ((_, cluster),) = clusters(found)
    port = int(cluster["gcsFaultToleranceOptions"]["redisAddress"].rpartition(":")[2])
    policy = next(one for one in of(found, "NetworkPolicy") if one["metadata"]["name"] == "redis")
    head = cluster["headGroupSpec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= head.items()
    assert [one["port"] for rule in policy["spec"]["egress"] for one in rule["ports"]] == [port]


def test_a_registry_is_named_once_for_every_pod(tmp_path: Path):
    moved = [{"name": f"potstill-{name}", "newName": f"registry.example/{name}"} for name in ("control", "gpu")]
    overlay = {"resources": [os.path.relpath(K8S / "overlays" / "gpu", tmp_path)], "images": moved}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    images = {one["image"] for pod in pods(manifests(str(tmp_path))) for one in pod.containers()}
    assert {image.rsplit(":", 1)[0] for image in images} == {"registry.example/control", "registry.example/gpu"}


def test_the_secrets_to_make_are_told_with_their_keys():
    told = "".join((K8S / where / "kustomization.yaml").read_text() for where in ("base", "job", "overlays/lasting"))
    made = re.findall(r"create secret generic (\S+)(?: \\\n#)?\s+--from-literal=([\w-]+)=", told)
    assert {(name, key) for name, keys in OUTSIDE.items() for key in keys} == set(made)


def test_the_job_goes_on_with_what_an_earlier_cluster_has_begun():
    job = next(one for one in manifests("job") if name_of(one) == JOB)
    assert job["spec"]["entrypoint"].split()[-1] == "--resume-if-begun"
    assert (job["spec"]["backoffLimit"], job["spec"]["shutdownAfterJobFinishes"]) == (3, True)
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    kept = load(K8S / "job" / "run.toml").runs
    assert {"/etc/potstill", kept} <= {one["mountPath"] for one in head["volumeMounts"]}
