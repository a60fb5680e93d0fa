"""What a run asks of a cluster: bundles for the learner's ranks, room for each rollout worker, and why there is none.

    separate     [ rank 0 ] [ rank 1 ]            together, or not at all       worker 0 · worker 1 · …   one by one
    colocated    [ rank 0 + worker 0 ] [ rank 1 + worker 1 ]                    worker 2 · …

Pure: it knows no Ray. cluster.py asks.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from potstill.config import RunConfig
from potstill.config_resources import Needs, worded

SLIVER = 0.001  # of the resource that stands for a node's address


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Equal for two runs whose processes can take each other's place."""

    bundles: tuple[Needs, ...]  # by rank; none where nothing is asked for
    strategy: str
    rank: Needs
    worker: Needs
    num_seated: int  # workers that lie in the bundle of the rank of their number

    @classmethod
    def of(cls, config: RunConfig, *, host: str | None = None) -> Placement:
        """host: the address of the only host that rollout workers may lie on, where there is such a one."""
        resources, ranks = config.resources, config.learner.ranks
        rank, worker = resources.learner.needs, dict(resources.rollout.needs)
        if host is not None:
            worker[f"node:{host}"] = SLIVER
        colocated = resources.layout == "colocated"
        num_seated = min(ranks, config.rollout.workers) if colocated else 0
        bundles = [_sum(rank, worker) if number < num_seated else rank for number in range(ranks)]
        return cls(
            bundles=tuple(bundles) if rank else (),
            strategy=resources.strategy,
            rank=rank,
            worker=worker,
            num_seated=num_seated,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A living node of the cluster, with all that it has, held by others or not."""

    address: str
    has: Needs


def shortage(what: str, bundles: Sequence[Needs], nodes: Sequence[Node], *, strategy: str, waited_s: float) -> str:
    """Why these bundles found no room: what is needed, and what each node has."""
    asked = sorted({name for bundle in bundles for name in bundle})
    count = f"{len(bundles)} × " if len(bundles) > 1 else ""
    there = "; ".join(f"{node.address} has {worded(_only(node.has, asked))}" for node in nodes)
    return (
        f"no room for the {what} within {waited_s:g} s (resources.wait_s): {count}{worded(bundles[0])} ({strategy}) is "
        f"asked for. {_reason(bundles, nodes, strategy, asked)}. Nodes: {there}. Add a node, or ask for less in "
        "[resources]"
    )


def same_host(addresses: Iterable[str], *, own: bool) -> bool:
    """Whether every process of a run, and whoever joins it later, shares one host, and so its memory.

    addresses  of the cluster's nodes now
    own        whether the run started that Ray itself, for its own machine
    A node may join any other cluster from elsewhere, unless it listens on loopback alone.
    """
    return own or all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _reason(bundles: Sequence[Needs], nodes: Sequence[Node], strategy: str, asked: Sequence[str]) -> str:
    if strategy == "STRICT_SPREAD" and len(bundles) > len(nodes):
        return f"STRICT_SPREAD wants {len(bundles)} nodes, and there are {len(nodes)}"
    for name in asked:
        one = max(bundle.get(name, 0.0) for bundle in bundles)
        together = sum(bundle.get(name, 0.0) for bundle in bundles)
        largest = max((node.has.get(name, 0.0) for node in nodes), default=0.0)
        if one > largest:
            return f"One process needs {one:g} {name}, and no node has more than {largest:g}"
        if strategy == "STRICT_PACK" and together > largest:
            return f"STRICT_PACK wants {together:g} {name} on one node, and none has more than {largest:g}"
        if together > (total := sum(node.has.get(name, 0.0) for node in nodes)):
            return f"{together:g} {name} are needed, and all nodes together have {total:g}"
    return "The nodes are large enough, and others hold what they have"


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> Needs:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}


def _only(has: Needs, names: Sequence[str]) -> Needs:
    return {name: has.get(name, 0.0) for name in names if not name.startswith("node:")}
