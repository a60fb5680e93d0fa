"""The Compose files as one, and what must hold of them: one function a rule, from the whole to a line for each breach.

Refuses nothing by itself; RULES names them all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import Any

import jsonschema
import yaml

from tests.deploy.command_lines import refusal
from tests.deploy.dockerfiles import PINNED, ROOT, SECRET, values

COMPOSE = ROOT / "deploy" / "compose"
SETTINGS = {"cpu": ["compose.yaml"], "gpu": ["compose.yaml", "compose.gpu.yaml"]}
MADE = "secrets/"  # by secrets.sh

Composed = dict[str, Any]

_REPLACED = {"command", "entrypoint", "test"}


def composed(setting: str) -> Composed:
    """A fresh one, which the caller may change."""
    whole: Composed = {}
    for name in SETTINGS[setting]:
        whole = _laid_over(whole, yaml.safe_load((COMPOSE / name).read_text()))
    return whole


def _laid_over(below: Any, above: Any, key: str = "") -> Any:
    """As Compose does it: mappings key by key, lists one after the other, but command lines and single values anew."""
    if isinstance(below, dict) and isinstance(above, dict):
        both = {name: _laid_over(below[name], above[name], name) for name in below.keys() & above.keys()}
        return {**below, **above, **both}
    if isinstance(below, list) and isinstance(above, list) and key not in _REPLACED:
        return [*below, *above]
    return above


def shaped(whole: Composed) -> Iterator[str]:
    """By the Compose specification's own schema."""
    vendored = resources.files("check_jsonschema.builtin_schemas.vendor")
    schema = json.loads(vendored.joinpath("compose-spec.json").read_text())
    for error in jsonschema.Draft202012Validator(schema).iter_errors(whole):
        yield f"{error.json_path}: {error.message[:200]}"


def on_loopback(whole: Composed) -> Iterator[str]:
    for name, service in whole["services"].items():
        for port in service.get("ports", []):
            if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", str(port)):
                yield f"{name}: {port} is for everybody"
        if service.get("network_mode"):
            yield f"{name}: network_mode"
        if service.get("ports") and "published" not in service.get("networks", []):
            yield f"{name} publishes a port into a network without a way out"
    if whole["networks"]["inside"] != {"internal": True}:
        yield "the inside has a way out"


def apart(whole: Composed) -> Iterator[str]:
    """What no client talks to is in the inner network alone."""
    for name in ("postgres", "head", "teacher"):
        service = whole["services"][name]
        if service.get("networks") != ["inside"] or service.get("ports"):
            yield f"{name} can be reached from outside"


def pinned(whole: Composed) -> Iterator[str]:
    for name, service in whole["services"].items():
        if not PINNED.fullmatch(service.get("image", "")):
            yield f"{name}: {service.get('image')} is not pinned to a version"


def confined(whole: Composed) -> Iterator[str]:
    for name, service in whole["services"].items():
        if not re.fullmatch(r"[1-9]\d*:\d+", str(service.get("user", ""))):
            yield f"{name} may be root"
        wanted = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
        yield from (f"{name}: {key}" for key, value in wanted.items() if service.get(key) != value)
        yield from (f"{name}: {key}" for key in ("privileged", "cap_add", "pid", "ipc", "devices") if key in service)
        if any("docker.sock" in str(volume) for volume in service.get("volumes", [])):
            yield f"{name} commands the machine's containers"


def bounded(whole: Composed) -> Iterator[str]:
    for name, service in whole["services"].items():
        missing = {"cpus", "memory", "pids"} - set(service.get("deploy", {}).get("resources", {}).get("limits", {}))
        if missing:
            yield f"{name}: no limit of {sorted(missing)}"


def healthy(whole: Composed) -> Iterator[str]:
    for name, service in whole["services"].items():
        test = service.get("healthcheck", {}).get("test", [])
        if test[:1] != ["CMD"] or len(test) < 2:  # of its own: what an image says depends on who starts it
            yield f"{name} is not asked for its health"
        for other, how in dict(service.get("depends_on", {})).items():
            if how != {"condition": "service_healthy"}:
                yield f"{name} does not wait until {other} answers"


def secretive(whole: Composed) -> Iterator[str]:
    """Secrets are files that secrets.sh makes; what is written here is where they are."""
    for name, service in whole["services"].items():
        for key, value in service.get("environment", {}).items():
            is_secret = SECRET.search(key.removesuffix("_PATH").removesuffix("_FILE"))
            if is_secret and not str(value).startswith("/run/secrets/"):
                yield f"{name}: {key} is written down"
        for given in service.get("secrets", []):
            if (given if isinstance(given, str) else given["source"]) not in whole.get("secrets", {}):
                yield f"{name}: there is no secret {given}"
        yield from (f"{name}: {file}" for file in service.get("env_file", []) if not str(file).startswith(MADE))
    for name, one in whole.get("secrets", {}).items():
        if not one.get("file", "").startswith(MADE):
            yield f"{name}: not from {MADE}"
    for text in re.findall(r"://[^/\s'\"]*:[^/\s'\"]*@", repr(whole)):
        yield f"a URL with a password: {text}"


def authenticated(whole: Composed) -> Iterator[str]:
    for name, service in whole["services"].items():
        given = service.get("environment", {})
        if "ray" in service.get("entrypoint", []) or "RAY_ADDRESS" in given:
            if given.get("RAY_AUTH_MODE") != "token" or given.get("RAY_AUTH_TOKEN_PATH") != "/run/secrets/ray_token":
                yield f"{name}: Ray is open"
            if "ray_token" not in service.get("secrets", []):
                yield f"{name} has no token"
    if "VLLM_SERVER_DEV_MODE" in repr(whole):
        yield "vLLM's development mode"


def agreed(whole: Composed) -> Iterator[str]:
    """Runs find folders and secrets where the service names them, and the service finds whom it calls."""
    api, head = whole["services"]["api"], whole["services"]["head"]
    for target in ("/runs", "/models"):
        if _mounts(api).get(target) is None or _mounts(api).get(target) != _mounts(head).get(target):
            yield f"{target} is not one folder"
    if api["user"] != head["user"]:
        yield "a run's files are another user's"
    keys = [[one for one in service["secrets"] if isinstance(one, dict)] for service in (api, head)]
    if not keys[0] or keys[0] != keys[1]:
        yield "a teacher's key is not where the service says"
    if (api["environment"]["RAY_ADDRESS"], api["environment"]["POTSTILL_TEACHERS"]) != ("http://head:8265", "teacher"):
        yield "the service calls somebody else"
    if not {"--report-url=http://api:8000", "--allow-host=api"} <= set(api["command"]):
        yield "runs cannot report"


def there(whole: Composed) -> Iterator[str]:
    """Every file and volume that is mounted or built from exists."""
    for name, service in whole["services"].items():
        for target, source in _mounts(service).items():
            if source.startswith(".") and not (COMPOSE / source).exists():
                yield f"{name}: there is no {source}, to be {target}"
            elif re.fullmatch(r"\w+", source) and source not in whole["volumes"]:
                yield f"{name}: there is no volume {source}"
        if "build" in service:
            file = COMPOSE / service["build"]["context"] / service["build"]["dockerfile"]
            if not file.exists():
                yield f"{name}: there is no {service['build']['dockerfile']}"
            elif service["user"] != values(file.read_text(), "USER")[-1]:
                yield f"{name}: not the image's user"


def commanded(whole: Composed) -> Iterator[str]:
    for name in ("api", "head", "teacher"):
        service = whole["services"][name]
        said = refusal([*(["ray"] if name == "head" else ["potstill"]), *service["command"]])
        if said is not None:
            yield f"{name}: {said}"


def _mounts(service: Mapping[str, Any]) -> dict[str, str]:
    """Source by target."""
    found = {}
    for volume in service.get("volumes", []):
        if isinstance(volume, str):
            source, target = volume.split(":")[:2]
            found[target] = source
        else:
            found[volume["target"]] = volume["source"]
    return found


RULES: Mapping[str, Callable[[Composed], Iterator[str]]] = {
    rule.__name__: rule
    for rule in (
        *(shaped, on_loopback, apart, pinned, confined, bounded, healthy, secretive),
        *(authenticated, agreed, there, commanded),
    )
}
