"""The units are ones that systemd takes, start what exists, and are closed; a run outlives the service's restart.

systemd-analyze (Debian's package systemd) reads them; no systemd runs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.deploy.command_lines import refusal

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
NAMES = sorted(path.name for path in UNITS.glob("*.service"))
INSTALLED = "/opt/potstill/bin"
CLOSED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectControlGroups": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "SystemCallArchitectures": "native",
    "CapabilityBoundingSet": "",
    "User": "potstill",
    "Restart": "on-failure",
}
Settings = dict[str, list[str]]


def read(name: str) -> Settings:
    """By setting, in the order of the file; comments and sections left out."""
    found: Settings = {}
    text = (UNITS / name).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def environment(settings: Settings) -> dict[str, str]:
    pairs = [pair for line in settings["Environment"] for pair in shlex.split(line)]
    return dict(pair.split("=", 1) for pair in pairs)


def started(name: str) -> list[str]:
    """The words of its command, with what the unit's own variables say in place."""
    settings = read(name)
    (line,) = settings["ExecStart"]
    words = []
    for word in line.split():
        own = environment(settings).get(word[1:], "") if word.startswith("$") else word
        words += own.split()
    return words


def complaints(folder: Path, *, misspelt: str = "") -> list[str]:
    """What systemd says of the units, on a machine that has the programs: it looks for them too."""
    programs = folder / "bin"
    programs.mkdir()
    for program in ("potstill", "python"):
        (programs / program).symlink_to("/bin/true")
    for name in NAMES:
        text = (UNITS / name).read_text().replace(INSTALLED, str(programs))
        (folder / name).write_text(text.replace(misspelt, f"X{misspelt}") if misspelt else text)
    command = ["systemd-analyze", "verify", "--man=no", *(name.replace("@", "@tiny") for name in NAMES)]
    variables = {**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=60)
    return [line for line in done.stderr.splitlines() if "potstill" in line]


def test_systemd_takes_them(tmp_path: Path):
    assert complaints(tmp_path) == []


def test_systemd_would_have_noticed_a_setting_that_it_does_not_know(tmp_path: Path):
    assert len(complaints(tmp_path, misspelt="RestrictNamespaces")) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_they_start_takes_its_options(name: str):
    program, *words = started(name)
    line = [Path(program).name, *words]
    if line[:3] == ["python", "-m", "ray.scripts.scripts"]:
        line = ["ray", *line[3:]]
    assert program.startswith(INSTALLED)
    assert refusal(line) is None


@pytest.mark.parametrize("name", NAMES)
def test_they_are_closed(name: str):
    settings = read(name)
    assert {key: settings.get(key, [None])[-1] for key in CLOSED} == CLOSED
    writable = settings.get("ReadWritePaths", []) + settings.get("ReadOnlyPaths", [])
    assert writable == ["/var/lib/potstill"]
    assert int(settings["TimeoutStopSec"][0]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_no_secret_is_in_a_unit_or_on_a_command_line(name: str):
    """Files hold them; systemd hands them on to the unit alone."""
    settings = read(name)
    assert [name for name in environment(settings) if re.search("KEY|TOKEN$|SECRET|PASSWORD", name)] == []
    assert [value.split(":")[1].startswith("/etc/potstill/") for value in settings["LoadCredential"]] == [True]
    assert "ray-token" in settings["LoadCredential"][0] or "--key-file" in started(name)


def test_runs_are_not_in_the_services_control_group():
    """The service is given a cluster, so that it starts no head of its own, which would be killed with its unit."""
    service, ray = read("potstill.service"), read("potstill-ray.service")
    ours, theirs = environment(service), environment(ray)
    flags = dict(word.split("=", 1) for word in started("potstill-ray.service") if "=" in word)
    assert ours["RAY_ADDRESS"] == f"http://{flags['--dashboard-host']}:{flags['--dashboard-port']}"
    assert (ours["RAY_AUTH_MODE"], theirs["RAY_AUTH_MODE"]) == ("token", "token")
    assert service["LoadCredential"] == ray["LoadCredential"]
    assert flags["--dashboard-host"] == flags["--node-ip-address"] == "127.0.0.1"
    assert service["Wants"] == ["potstill-ray.service"]
    assert not {"Requires", "BindsTo", "PartOf"} & (service.keys() | ray.keys())  # one's restart is not the other's


def test_the_first_key_is_not_in_the_log():
    """`potstill serve` says it on stdout."""
    assert read("potstill.service")["StandardOutput"] == ["null"]
    assert "--key-file" in started("potstill.service")
