"""The shape of manifests: Kubernetes' own kinds by its published schemas, strictly, and those of two operators.

Of the operators' kinds it knows the fields that ours use, and refuses any other; pod templates in them are held to
Kubernetes' own schema again. Source: KubeRay 1.7.0, ray-operator/config/crd/bases; each field here is one of that
definition, of its type, and what it requires is required here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate

from tests.deploy.manifests import Manifest, clusters, name_of

KUBERNETES = "1.34"

_TEXT, _FLAG, _WHOLE, _ANYTHING = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}, {}


def _of(*required: str, **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


def _one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


_META = _of("name", "namespace", name=_TEXT, namespace=_TEXT, labels={"additionalProperties": _TEXT})
_START = {"type": "object", "additionalProperties": _TEXT}  # options of `ray start`, all of them text
_HEAD = _of(
    "template", serviceType=_one_of("ClusterIP", "NodePort", "LoadBalancer"), rayStartParams=_START, template=_ANYTHING
)
_WORKERS = _of(
    *("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=_TEXT,
    replicas=_WHOLE,
    minReplicas=_WHOLE,
    maxReplicas=_WHOLE,
    rayStartParams=_START,
    template=_ANYTHING,
)
_SECRET = _of("valueFrom", valueFrom=_of("secretKeyRef", secretKeyRef=_of("name", "key", name=_TEXT, key=_TEXT)))
_CLUSTER = _of(
    "headGroupSpec",
    rayVersion=_TEXT,
    gcsFaultToleranceOptions=_of("redisAddress", "redisPassword", redisAddress=_TEXT, redisPassword=_SECRET),
    authOptions=_of(mode=_one_of("token", "disabled"), secretName=_TEXT),
    headGroupSpec=_HEAD,
    workerGroupSpecs=_list(_WORKERS),
)
_JOB = _of(
    entrypoint=_TEXT,
    submissionMode=_one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
    backoffLimit=_WHOLE,
    activeDeadlineSeconds=_WHOLE,
    shutdownAfterJobFinishes=_FLAG,
    ttlSecondsAfterFinished=_WHOLE,
    rayClusterSpec=_CLUSTER,
)
_ENDPOINT = _of(port=_TEXT, path=_TEXT, interval={"type": "string", "pattern": r"^\d+s$"})
_MONITOR = _of(
    "selector", "endpoints", selector=_of(matchLabels={"additionalProperties": _TEXT}), endpoints=_list(_ENDPOINT)
)

OPERATORS = {
    ("ray.io/v1", "RayCluster"): _CLUSTER,
    ("ray.io/v1", "RayJob"): _JOB,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _MONITOR,
}


def misshapen(found: list[Manifest]) -> Iterator[str]:
    """What no API server would take."""
    for manifest in found:
        spec = OPERATORS.get((manifest["apiVersion"], manifest["kind"]))
        if spec is None:
            yield from _built_in(manifest, name_of(manifest))
        else:
            schema = _of("spec", apiVersion=_TEXT, kind=_TEXT, metadata=_META, spec=spec)
            for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest):
                yield f"{name_of(manifest)}: {error.json_path}: {error.message[:200]}"
    for owner, cluster in clusters(found):
        for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
            template = group.get("template", {})
            metadata = template.get("metadata", {}) | {"name": "pod"}
            pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": metadata}
            yield from _built_in(pod, owner)


def _built_in(manifest: Manifest, name: str) -> Iterator[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{name}: {'.'.join(map(str, error.path))}: {error.message[:200]}"
