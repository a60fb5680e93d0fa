"""A Slurm of two nodes on this machine, on loopback and in a folder of its own: Debian's slurmctld, slurmd and munge.

Nodes are of eight cores each, whatever the machine has, and their names mean nothing to anybody but Slurm.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_port
from tests.services import until

NODES = ("n1", "n2")


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A running cluster; `config` leads Slurm's programs to it."""

    config: Path

    def submit(self, script: Path, **more: str) -> str:
        """The job's number."""
        return self._said("sbatch", "--parsable", f"--export=ALL{_listed(more)}", str(script))

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of it."""
        return dict(re.findall(r"(\w+)=(\S*)", self._said("scontrol", "show", "job", "--oneliner", number)))

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def limit(self, number: str, minutes: int) -> None:
        """Change how long it may run."""
        self._said("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")

    def cancel(self, number: str) -> None:
        self._said("scancel", number)

    def empty(self) -> None:
        """Cancel whatever is there, and wait until it is gone: its processes would outlive the cluster."""
        self._said("scancel", "--user", getpass.getuser())
        until(lambda: self._said("squeue", "--noheader") == "", 90.0)

    def _said(self, *command: str) -> str:
        environment = {**os.environ, "SLURM_CONF": str(self.config)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """While the block lasts."""
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(_config(folder))
    munge = ["munged", "--foreground", "--force", f"--socket={folder / 'munge.sock'}"]
    munge += [f"--{name}-file={folder / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")]
    with ExitStack() as stack:
        stack.enter_context(_started(munge, folder))
        until((folder / "munge.sock").exists, 30.0)
        for command in (["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)):
            stack.enter_context(_started(command, folder))
        cluster = Slurm(config=folder / "slurm.conf")
        until(lambda: cluster._said("sinfo", "--noheader", "--format=%D %T") == f"{len(NODES)} idle", 60.0)
        stack.callback(cluster.empty)
        yield cluster


@contextmanager
def _started(command: list[str], folder: Path) -> Iterator[None]:
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with (folder / f"{command[0]}.said").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60.0)


def _config(folder: Path) -> str:
    me, host = getpass.getuser(), socket.gethostname()
    lines = [
        "ClusterName=tiny",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={free_port()}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder / 'munge.sock'}",
        "CredType=cred/munge",
        f"SlurmUser={me}",
        f"SlurmdUser={me}",
        f"StateSaveLocation={folder / 'state'}",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder / 'slurmctld.log'}",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerType=sched/builtin",
        "SchedulerParameters=batch_sched_delay=1,sched_interval=2",
        "SlurmdParameters=config_overrides",  # of cores that are not there
        "ReturnToService=2",
        *(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=8 RealMemory=1000"
            for node in NODES
        ),
        f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP",
    ]
    return "\n".join(lines) + "\n"


def _listed(variables: Mapping[str, str]) -> str:
    return "".join(f",{name}={value}" for name, value in variables.items())
