"""Rendered manifests, and the pods in them: of Deployments, and of Ray clusters by themselves or within a job.

Refuses to render without kubectl.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

K8S = Path(__file__).parents[2] / "deploy" / "k8s"
SETTINGS = ("overlays/cpu", "overlays/gpu", "overlays/lasting", "overlays/dev", "job")

Manifest = dict[str, Any]


class Pod(NamedTuple):
    owner: str
    labels: dict[str, str]
    spec: Manifest
    ray: bool  # KubeRay completes it

    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@cache
def rendered(setting: str) -> str:
    assert shutil.which("kubectl"), "kubectl renders the manifests, and this machine has none: see .ci/tools"
    command = ["kubectl", "kustomize", str(K8S / setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def manifests(setting: str) -> list[Manifest]:
    """Fresh ones, which the caller may change."""
    return list(yaml.safe_load_all(rendered(setting)))


def of(found: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    return [one for one in found if one["kind"] in kinds]


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def clusters(found: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """The specs of Ray clusters."""
    for one in of(found, "RayCluster"):
        yield name_of(one), one["spec"]
    for one in of(found, "RayJob"):
        yield name_of(one), one["spec"]["rayClusterSpec"]


def pods(found: Sequence[Manifest]) -> Iterator[Pod]:
    for one in of(found, "Deployment"):
        template = one["spec"]["template"]
        yield Pod(name_of(one), template["metadata"]["labels"], template["spec"], ray=False)
    for owner, spec in clusters(found):
        for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])):
            template = group["template"]
            yield Pod(
                f"{owner} {group.get('groupName', 'head')}", template["metadata"]["labels"], template["spec"], True
            )


def every(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every text, number and truth below a value, each with the key that it stands under."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from every(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from every(inner, key)
    else:
        yield key, value
