"""A run as a Slurm job: what it asks of the cluster, and its batch script, made from the templates of deploy/slurm.

    one node     potstill run, on a Ray of its own
    several      srun starts Ray on every node, behind a token of the job's own; potstill run lies beside its head

What a config or an operator names stands in a script as one quoted word of the shell. Pure: it reads the templates and
nothing else. Refuses what `sbatch` or Ray could never grant: a time that is none, names that are no names, resources
that a node of Slurm is not started with, and fewer GPUs than the run begins with.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from orchestrator.placement import Placement
from potstill.config import RunConfig
from potstill.config_resources import Needs
from potstill.errors import ConfigError
from potstill.recipes import shipped

NOTICE_S = 300  # between SIGTERM and the limit: for the step under way, its checkpoint and Ray's end
EARLY_S = 60  # by which Slurm may send a signal before its time
TIME = re.compile(r"(?:(?P<days>\d+)-(?P<of_day>\d+(?::\d\d){0,2}))|(?P<plain>\d+(?::\d\d){0,2})")
NAMES = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What the job asks for."""

    nodes: int
    gpus_per_node: int
    cpus: int  # of a single node; several are taken whole

    @property
    def words(self) -> str:
        """Example: "2 nodes with 8 GPUs each"."""
        gpus = f"{self.gpus_per_node} GPU{'s' * (self.gpus_per_node != 1)}"
        return f"1 node with {gpus}" if self.nodes == 1 else f"{self.nodes} nodes with {gpus} each"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run's place, and where its files are."""

    room: Room
    time: str
    partition: str | None
    account: str | None
    python: str  # with which the run is started: whoever renders has the packages
    folder: Path  # in which it is started, as the nodes see it too
    config: Path  # resolved

    def __post_init__(self) -> None:
        if seconds(self.time) <= NOTICE_S + EARLY_S:
            raise ConfigError(
                f"--time {self.time}: a run is asked to stop {NOTICE_S // 60} minutes before the limit: give it more"
            )
        for option, name in (("--partition", self.partition), ("--account", self.account)):
            if name is not None and not NAMES.fullmatch(name):
                raise ConfigError(f"{option} {name!r}: letters, digits, _ . , and -")


def render(config: RunConfig, job: Job) -> str:
    """The batch script."""
    environment = Environment(  # noqa: S701 - a script, not a page: user text goes through `word`
        loader=FileSystemLoader(shipped("slurm")),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["word"] = lambda value: shlex.quote(str(value))
    template = "single_node" if job.room.nodes == 1 else "multi_node"
    return environment.get_template(f"{template}.sbatch.j2").render(
        name=config.name,
        job=job,
        room=job.room,
        notice_s=NOTICE_S,
        early_s=EARLY_S,
    )


def room(config: RunConfig, *, nodes: int | None, gpus_per_node: int | None) -> Room:
    """What is not given follows from [resources]: as few nodes as hold the run, and as few GPUs on each."""
    if custom := sorted({**config.resources.learner.custom, **config.resources.rollout.custom}):
        raise ConfigError(
            f"resources: custom {', '.join(custom)}: nodes of a job are started without; choose them by --partition"
        )
    placement, rollout, strategy = Placement.of(config), config.rollout, config.resources.strategy
    ranks = placement.bundles
    workers = [placement.worker] * (rollout.workers - placement.num_seated)
    fewest = [placement.worker] * (min(rollout.min_workers, rollout.workers) - placement.num_seated)
    wanted, needed = _num_gpus([*ranks, *workers]), _num_gpus([*ranks, *fewest])
    together = [[one] for one in (*ranks, *workers)] + ([ranks] if strategy == "STRICT_PACK" else [])
    on_one_node = max(map(_num_gpus, together), default=0)

    if nodes is None:
        apart = len(ranks) if strategy == "STRICT_SPREAD" else 1
        nodes = max(1, apart, math.ceil(wanted / gpus_per_node) if gpus_per_node else 1)
    if gpus_per_node is None:
        gpus_per_node = max(on_one_node, math.ceil(wanted / nodes))
    asked = f"--nodes {nodes} --gpus-per-node {gpus_per_node}"
    if strategy == "STRICT_SPREAD" and len(ranks) > nodes:
        raise ConfigError(f"{asked}: STRICT_SPREAD lays {len(ranks)} ranks on as many nodes")
    if on_one_node > gpus_per_node:
        raise ConfigError(f"{asked}: {on_one_node} GPUs are needed on one node ({strategy})")
    if needed > nodes * gpus_per_node:
        raise ConfigError(f"{asked}: the run needs {needed} GPUs to begin with")

    held = sum(needs.get("CPU", 0.0) for needs in (*ranks, *workers))
    threads = config.learner.ranks * config.learner.threads + rollout.workers * rollout.threads
    return Room(nodes=nodes, gpus_per_node=gpus_per_node, cpus=1 + max(math.ceil(held), threads))


def seconds(time: str) -> int:
    """Of a limit as Slurm writes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    found = TIME.fullmatch(time)
    if found is None:
        raise ConfigError(f"--time {time!r}: write minutes, HH:MM:SS or D-HH:MM:SS, e.g. 24:00:00")
    if found["days"] is not None:
        parts = [int(part) for part in found["of_day"].split(":")]
        hours, minutes, rest = parts + [0] * (3 - len(parts))
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + rest
    parts = [int(part) for part in found["plain"].split(":")]
    hours, minutes, rest = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return (hours * 60 + minutes) * 60 + rest


def _num_gpus(bundles: Sequence[Needs]) -> int:
    """GPUs that hold all of these: whole ones, and shares of one, the largest first, where there is room for them."""
    whole, free = 0, list[float]()
    for share in sorted((needs.get("GPU", 0.0) for needs in bundles), reverse=True):
        if share >= 1:
            whole += int(share)
        elif share > 0:
            place = next((place for place, left in enumerate(free) if round(left - share, 4) >= 0), None)
            if place is None:
                free.append(1 - share)
            else:
                free[place] -= share
    return whole + len(free)
