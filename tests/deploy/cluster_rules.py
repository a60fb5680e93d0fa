"""What must hold of the manifests: one function a rule, from all of them to a line for each that breaks it.

Refuses nothing by itself; RULES names them all.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.deploy.command_lines import refusal
from tests.deploy.dockerfiles import CONTROL, PINNED, SECRET, values
from tests.deploy.manifests import Manifest, Pod, clusters, every, name_of, of, pods

RAY_PORTS = {6379, 8265, 10001}
OUTSIDE = {
    "potstill-database": {"url"},
    "potstill-ray": {"auth_token"},
    "potstill-redis": {"password"},
    "potstill-teacher": {"teacher-key"},
}
"""Secrets that the operator makes, with their keys."""
USER = int(values(CONTROL.read_text(), "USER")[-1].split(":")[0])

_POD = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_CONTAINER = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
_LOOSER = {"privileged", "runAsUser", "runAsNonRoot", "seccompProfile", "procMount"}  # of a container: over the pod's


def confined(found: list[Manifest]) -> Iterator[str]:
    for pod in pods(found):
        given = pod.spec.get("securityContext", {})
        yield from (f"{pod.owner}: {key} is {given.get(key)}" for key, value in _POD.items() if given.get(key) != value)
        yield from (f"{pod.owner}: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(key))
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.owner} is given a token of the API server"
        for volume in pod.spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{pod.owner}: {volume['name']} is a folder of the node"
        for container in pod.containers():
            where, given = f"{pod.owner} {container['name']}", container.get("securityContext", {})
            yield from (f"{where}: {key}" for key, value in _CONTAINER.items() if given.get(key) != value)
            yield from (f"{where}: {key} for itself" for key in _LOOSER & set(given))
            yield from (f"{where}: a port of the node" for port in container.get("ports", []) if "hostPort" in port)


def bounded(found: list[Manifest]) -> Iterator[str]:
    """CPU and memory are asked for and limited; what a pod writes beside its volumes is limited too."""
    for pod in pods(found):
        for container in pod.containers():
            for side in ("requests", "limits"):
                missing = {"cpu", "memory"} - set(container.get("resources", {}).get(side, {}))
                if missing:
                    yield f"{pod.owner} {container['name']}: no {side} of {sorted(missing)}"
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod.owner}: {volume['name']} may fill the node"


def probed(found: list[Manifest]) -> Iterator[str]:
    """Containers of ours are asked by our own routes. Those of Ray's pods are KubeRay's to ask, by GET /api/healthz."""
    for pod in pods(found):
        for container in pod.spec["containers"]:
            for probe, path in (("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
                if not pod.ray and container.get(probe, {}).get("httpGet", {}).get("path") != path:
                    yield f"{pod.owner} {container['name']}: no {probe} at {path}"


def pinned(found: list[Manifest]) -> Iterator[str]:
    for pod in pods(found):
        for container in pod.containers():
            if not PINNED.fullmatch(container["image"]):
                yield f"{pod.owner}: {container['image']} is not pinned to a version"


def secretive(found: list[Manifest]) -> Iterator[str]:
    """Secrets come by reference alone; nothing rendered holds one."""
    yield from (f"{name_of(one)} is in the manifests" for one in of(found, "Secret"))
    for one in found:
        for key, value in every(one):
            if re.search(r"://[^/\s]*:[^/\s]*@", str(value)):
                yield f"{name_of(one)}: {key} is a URL with a password"
    for one in of(found, "ConfigMap"):
        yield from (f"{name_of(one)}: {key}" for key in one.get("data", {}) if SECRET.search(key))
    for owner, cluster in clusters(found):
        if "value" in _redis_password(cluster):
            yield f"{owner}: Redis's password is written down"
    for pod in pods(found):
        for container in pod.containers():
            for variable in container.get("env", []):
                name = variable["name"]
                wanted = SECRET.search(name) or name == "POTSTILL_DATABASE"
                if wanted and "secretKeyRef" not in variable.get("valueFrom", {}):
                    yield f"{pod.owner}: {name} is written down"


def authenticated(found: list[Manifest]) -> Iterator[str]:
    """Every Ray node, and whoever calls one, has the token of the cluster and asks for it."""
    for owner, cluster in clusters(found):
        if cluster.get("authOptions") != {"mode": "token", "secretName": "potstill-ray"}:
            yield f"{owner} is open"
    for pod in pods(found):
        for container in pod.containers():
            given = {variable["name"]: variable for variable in container.get("env", [])}
            if pod.ray or "RAY_ADDRESS" in given:
                if given.get("RAY_AUTH_MODE", {}).get("value") != "token":
                    yield f"{pod.owner} {container['name']}: RAY_AUTH_MODE"
                source = given.get("RAY_AUTH_TOKEN", {}).get("valueFrom", {}).get("secretKeyRef")
                if source != {"name": "potstill-ray", "key": "auth_token"}:
                    yield f"{pod.owner} {container['name']}: RAY_AUTH_TOKEN"


def no_development(found: list[Manifest]) -> Iterator[str]:
    """vLLM's development mode opens routes that no key guards."""
    for one in found:
        if "VLLM_SERVER_DEV_MODE" in repr(one):
            yield f"{name_of(one)}: VLLM_SERVER_DEV_MODE"


def unexposed(found: list[Manifest]) -> Iterator[str]:
    """Nothing of ours is published by itself, Ray least of all: clients come through an ingress, to the API's port."""
    for owner, cluster in clusters(found):
        head = cluster["headGroupSpec"]
        if head.get("serviceType") != "ClusterIP" or head.get("enableIngress") or "headService" in head:
            yield f"{owner}: the head's ports are published"
    services = {one["metadata"]["name"]: one["spec"] for one in of(found, "Service")}
    for name, service in services.items():
        if service.get("type", "ClusterIP") != "ClusterIP" or service.get("externalIPs"):
            yield f"Service/{name} is published"
    for one in of(found, "Ingress"):
        for backend in _backends(one):
            port = _reached(services.get(backend["name"], {}), backend.get("port", {}), found)
            if port in RAY_PORTS or port is None:
                yield f"{name_of(one)} leads to {backend}"


def _backends(ingress: Manifest) -> Iterator[Manifest]:
    paths = [path for rule in ingress["spec"].get("rules", []) for path in rule.get("http", {}).get("paths", [])]
    backends = [path["backend"] for path in paths] + [ingress["spec"].get("defaultBackend", {})]
    yield from (backend["service"] for backend in backends if "service" in backend)


def _reached(service: Manifest, asked: Manifest, found: list[Manifest]) -> int | None:
    """The container's port behind a service's; None for one that is not known."""
    for port in service.get("ports", []):
        if asked in ({"number": port["port"]}, {"name": port.get("name")}):
            target = port.get("targetPort", port["port"])
            if isinstance(target, int):
                return target
            for pod in pods(found):
                for held in _ports(pod):
                    if held.get("name") == target and _matches(service.get("selector"), pod.labels):
                        return int(held["containerPort"])
    return None


def walled(found: list[Manifest]) -> Iterator[str]:
    """Nothing passes but what a policy names; every port has one; and none is open to everybody."""
    policies = of(found, "NetworkPolicy")
    if not any(one["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} for one in policies):
        yield "nothing is denied by default"
    for one in policies:
        for side, peers in (("ingress", "from"), ("egress", "to")):
            for rule in one["spec"].get(side, []):
                if not rule.get(peers) or any(_is_anybody(peer) for peer in rule[peers]):
                    yield f"{name_of(one)}: {side} of everybody"
    for pod in pods(found):
        rules = [
            rule
            for one in policies
            if _selects(one["spec"]["podSelector"], pod.labels)
            for rule in one["spec"].get("ingress", [])
        ]
        for port in _ports(pod):
            if not any(_lets_in(rule, port) for rule in rules):
                yield f"{pod.owner}: nobody may reach port {port['containerPort']}"


def _is_anybody(peer: Manifest) -> bool:
    return not any(peer.get(key) for key in ("podSelector", "namespaceSelector", "ipBlock")) or (
        "ipBlock" in peer and peer["ipBlock"]["cidr"] in ("0.0.0.0/0", "::/0")
    )


def _lets_in(rule: Manifest, port: Manifest) -> bool:
    named = [one.get("port") for one in rule.get("ports", [])]
    return not named or port["containerPort"] in named or port.get("name") in named


def may_call(found: list[Manifest], caller: Pod, called: Pod, port: int) -> bool:
    """Whether the policies let a pod of the namespace call a port of another: one lets it out, and one lets it in."""

    def passes(side: str, peers: str, ours: Pod, other: Pod) -> bool:
        return any(
            _selects(one["spec"]["podSelector"], ours.labels)
            and any(
                "namespaceSelector" not in peer and _selects(peer["podSelector"], other.labels) for peer in rule[peers]
            )
            and (not rule.get("ports") or port in [named["port"] for named in rule["ports"]])
            for one in of(found, "NetworkPolicy")
            for rule in one["spec"].get(side, [])
        )

    return passes("egress", "to", caller, called) and passes("ingress", "from", called, caller)


def complete(found: list[Manifest]) -> Iterator[str]:
    """What a pod names is rendered beside it, or is a secret that the operator was told to make."""
    have = {name_of(one) for one in found}
    for owner, cluster in clusters(found):
        reference = _redis_password(cluster).get("valueFrom", {}).get("secretKeyRef")
        if reference is not None and reference["key"] not in OUTSIDE.get(reference["name"], set()):
            yield f"{owner}: nobody makes {reference}"
    for pod in pods(found):
        wanted = {f"ServiceAccount/{pod.spec.get('serviceAccountName')}"}
        for volume in pod.spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                wanted.add(f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}")
            if "configMap" in volume:
                wanted.add(f"ConfigMap/{volume['configMap']['name']}")
            if "secret" in volume and volume["secret"]["secretName"] not in OUTSIDE:
                yield f"{pod.owner}: nobody makes the secret {volume['secret']['secretName']}"
        yield from (f"{pod.owner}: there is no {one}" for one in sorted(wanted - have))
        for container in pod.containers():
            for reference in _secret_keys(container):
                if reference["key"] not in OUTSIDE.get(reference["name"], set()):
                    yield f"{pod.owner}: nobody makes {reference}"
            mounted = {one["name"] for one in container.get("volumeMounts", [])}
            missing = mounted - {one["name"] for one in pod.spec.get("volumes", [])}
            yield from (f"{pod.owner}: there is no volume {one}" for one in sorted(missing))


def _redis_password(cluster: Manifest) -> Manifest:
    """Of the Redis in which a cluster's GCS keeps its state; empty where there is none."""
    given: Manifest = cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
    return given


def _secret_keys(container: Manifest) -> Iterator[Manifest]:
    for variable in container.get("env", []):
        if "secretKeyRef" in variable.get("valueFrom", {}):
            yield variable["valueFrom"]["secretKeyRef"]


def joined(found: list[Manifest]) -> Iterator[str]:
    """What selects pods or services finds some, by labels and by ports."""
    all_pods = list(pods(found))
    services = of(found, "Service")
    for one in of(found, "Deployment"):
        if not _selects(one["spec"]["selector"], one["spec"]["template"]["metadata"]["labels"]):
            yield f"{name_of(one)} does not select its own pods"
    for one in services:
        behind = [pod for pod in all_pods if _matches(one["spec"].get("selector"), pod.labels)]
        if not behind:
            yield f"{name_of(one)} selects nothing"
        for port in one["spec"]["ports"]:
            for pod in behind:
                if port["targetPort"] not in {held.get("name") for held in _ports(pod)}:
                    yield f"{name_of(one)}: {pod.owner} has no port {port['targetPort']}"
    for one in of(found, "PodDisruptionBudget", "NetworkPolicy"):
        selector = one["spec"].get("podSelector", one["spec"].get("selector"))
        if not any(_selects(selector, pod.labels) for pod in all_pods):
            yield f"{name_of(one)} selects nothing"
    for one in of(found, "NetworkPolicy"):
        for rule in (*one["spec"].get("ingress", []), *one["spec"].get("egress", [])):
            for peer in (*rule.get("from", []), *rule.get("to", [])):
                inside = "podSelector" in peer and "namespaceSelector" not in peer
                if inside and not any(_selects(peer["podSelector"], pod.labels) for pod in all_pods):
                    yield f"{name_of(one)}: a peer that is nobody"
    for one in of(found, "HorizontalPodAutoscaler"):
        target = one["spec"]["scaleTargetRef"]
        if f"{target['kind']}/{target['name']}" not in {name_of(other) for other in found}:
            yield f"{name_of(one)} scales nothing"
    for one in of(found, "ServiceMonitor"):
        watched = [
            other for other in services if _selects(one["spec"]["selector"], other["metadata"].get("labels", {}))
        ]
        ports = {port["name"] for other in watched for port in other["spec"]["ports"]}
        if any(endpoint["port"] not in ports for endpoint in one["spec"]["endpoints"]):
            yield f"{name_of(one)} watches nothing"


def commanded(found: list[Manifest]) -> Iterator[str]:
    """Every command line is one that the program takes."""
    for pod in pods(found):
        for container in pod.containers():
            words = [*container.get("command", [] if pod.ray else ["potstill"]), *container.get("args", [])]
            said = refusal(words) if words else None  # Ray's own are KubeRay's
            if said is not None:
                yield f"{pod.owner}: {said}"
    for one in of(found, "RayJob"):
        said = refusal(shlex.split(one["spec"]["entrypoint"]))
        if said is not None:
            yield f"{name_of(one)}: {said}"


RULES: Mapping[str, Callable[[list[Manifest]], Iterator[str]]] = {
    rule.__name__: rule
    for rule in (
        *(confined, bounded, probed, pinned, secretive, authenticated, no_development),
        *(unexposed, walled, complete, joined, commanded),
    )
}


def _ports(pod: Pod) -> list[Manifest]:
    return [port for container in pod.containers() for port in container.get("ports", [])]


def _matches(wanted: Mapping[str, str] | None, labels: Mapping[str, str]) -> bool:
    return bool(wanted) and wanted.items() <= labels.items()  # type: ignore[union-attr]


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a selector of labels and expressions, of which ours only use In, takes these."""
    wanted, expressions = selector.get("matchLabels", {}), selector.get("matchExpressions", [])
    assert all(one["operator"] == "In" for one in expressions), selector
    return wanted.items() <= labels.items() and all(labels.get(one["key"]) in one["values"] for one in expressions)
