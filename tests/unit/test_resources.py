"""The [resources] table: what a run asks of a cluster, what it may not, and what is said when there is no room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster import enter, holding
from orchestrator.placement import Node, Placement, same_host, shortage
from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.errors import ConfigError, PlanError
from potstill.planner import plan
from tests.tiny_models import save_tiny_model

VLLM = "rollout.engine=vllm"
GPUS = ("resources.learner={cpus: 4, gpus: 1}", "resources.rollout.gpus=1", VLLM)
SHARED = (
    *("resources.layout=colocated", "resources.learner={cpus: 4, gpus: 0.6}", "resources.rollout.gpus=0.4"),
    *(VLLM, "rollout.vllm.cache_gb=8"),
)
ONE, TWO = Node(address="10.0.0.1", has={"CPU": 8.0, "GPU": 1.0}), Node(address="10.0.0.2", has={"CPU": 8.0})


def make_config(*changes: str, model: Path | str = "models/student") -> RunConfig:
    tables: dict[str, Any] = {
        "name": "one",
        "method": "sft",
        "student": {"model": str(model)},
        "teacher": {"kind": "none"},
        "data": {"kind": "jsonl", "path": "data.jsonl"},
        "rollout": {"source": "reference", "prompts_per_step": 3, "sampling": {"max_new_tokens": 5}},
        "optim": {"lr": 1e-4},
        "loop": {"steps": 7},
    }
    return parse(tables, changes)


def test_by_default_nothing_is_asked_for():
    placed = Placement.of(make_config("learner.ranks=2", "rollout.workers=4"))
    assert (placed.bundles, placed.rank, placed.worker) == ((), {}, {})
    assert placed == Placement.of(make_config("learner.ranks=1", "rollout.workers=1"))
    assert holding({}) == {"num_cpus": 0.0, "resources": {}}, "of GPUs nothing is said: Ray would hide them"


def test_separate_ranks_have_a_bundle_each_and_workers_none():
    placed = Placement.of(make_config("learner.ranks=2", "rollout.workers=4", *GPUS))
    assert placed.bundles == ({"CPU": 4.0, "GPU": 1.0},) * 2
    assert (placed.worker, placed.num_seated) == ({"GPU": 1.0}, 0)
    assert holding(placed.rank | {"a100": 1.0}) == {"num_cpus": 4.0, "num_gpus": 1.0, "resources": {"a100": 1.0}}


@pytest.mark.parametrize(("workers", "seated"), [(1, 1), (2, 2), (3, 2)])
def test_colocated_workers_lie_in_the_bundle_of_the_rank_of_their_number(workers: int, seated: int):
    placed = Placement.of(make_config("learner.ranks=2", f"rollout.workers={workers}", *SHARED))
    shared, alone = {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 0.6}
    assert placed.bundles == tuple(shared if number < seated else alone for number in range(2))
    assert placed.num_seated == seated


def test_workers_that_must_stay_on_a_host_ask_for_its_address_alone():
    assert Placement.of(make_config(*GPUS), host="10.0.0.1").worker == {"GPU": 1.0, "node:10.0.0.1": 0.001}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("resources.learner.gpus=1.5",), "gpus = 1.5: whole GPUs, or a share of one below 1"),
        (("resources.rollout.custom={GPU: 1}",), "GPU is Ray's own name; use cpus and gpus"),
        (("resources.layout=colocated", "resources.rollout.gpus=1"), "say what resources.learner needs"),
        (("resources.layout=colocated", *GPUS), "add up to 1 at most; here 1 and 1"),
        (("resources.layout=colocated", "resources.learner.gpus=0.5"), "both above 0, .* here 0.5 and 0"),
        (("resources.wait_s=0",), "wait_s"),
        (("resources.learner.gpu=1",), "gpus"),
    ],
)
def test_what_ray_could_not_place_is_refused_by_name(changes: tuple[str, ...], says: str):
    with pytest.raises(ConfigError, match=says):
        make_config(*changes)


@pytest.mark.parametrize(
    ("bundles", "strategy", "says"),
    [
        ([{"GPU": 2.0}], "PACK", "One process needs 2 GPU, and no node has more than 1"),
        ([{"GPU": 1.0}] * 2, "PACK", "2 GPU are needed, and all nodes together have 1"),
        ([{"CPU": 6.0}] * 2, "STRICT_PACK", "STRICT_PACK wants 12 CPU on one node, and none has more than 8"),
        ([{"CPU": 1.0}] * 3, "STRICT_SPREAD", "STRICT_SPREAD wants 3 nodes, and there are 2"),
        ([{"a100": 1.0}], "PACK", "One process needs 1 a100, and no node has more than 0"),
        ([{"CPU": 6.0}] * 2, "PACK", "The nodes are large enough, and others hold what they have"),
    ],
)
def test_a_shortage_names_what_is_missing(bundles: list[dict[str, float]], strategy: str, says: str):
    assert says in shortage("learner", bundles, [ONE, TWO], strategy=strategy, waited_s=5.0)


def test_a_shortage_shows_what_every_node_has_of_what_is_asked_for():
    said = shortage("learner", [{"GPU": 2.0}] * 2, [ONE, TWO], strategy="PACK", waited_s=1.5)
    assert "within 1.5 s (resources.wait_s): 2 × 2 GPU (PACK) is asked for" in said
    assert "Nodes: 10.0.0.1 has 1 GPU; 10.0.0.2 has 0 GPU. " in said


def test_processes_share_a_host_where_no_other_can_join():
    assert same_host(["10.0.0.1"], own=True)
    assert same_host(["127.0.0.1", "127.0.0.1"], own=False)
    assert not same_host(["10.0.0.1"], own=False), "a node may join from elsewhere"


@pytest.mark.parametrize(
    ("changes", "asks"),
    [
        ((), ("learner: 1 rank with nothing", "rollout: 1 worker with nothing")),
        (
            ("learner.ranks=2", "rollout.workers=4", *GPUS),
            (
                "learner: 2 ranks each with 4 CPU, 1 GPU, together or not at all (PACK)",
                "rollout: 4 workers each with 1 GPU, 1 to begin with",
            ),
        ),
        (
            SHARED,
            (
                "learner: 1 rank with 4 CPU, 0.6 GPU, together or not at all (PACK)",
                "rollout: 1 worker with 0.4 GPU, 1 in the bundle of a rank",
            ),
        ),
    ],
)
def test_the_plan_names_the_layout_and_what_it_asks_for(
    tmp_path: Path, changes: tuple[str, ...], asks: tuple[str, ...]
):
    config = make_config(*changes, model=save_tiny_model(tmp_path, seed=0))
    assert (plan(config).layout, plan(config).asks) == (config.resources.layout, asks)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("resources.rollout.gpus=1",), 'engine = "vllm", or resources'),
        (("rollout.vllm.tensor_parallel=2",), 'tensor_parallel = 2 is for rollout.engine = "vllm"'),
        ((*GPUS, "rollout.vllm.tensor_parallel=2"), r"as many GPUs: resources\.rollout\.gpus = 2"),
        ((VLLM, "rollout.vllm.tensor_parallel=2", "weights.transport=device"), '"auto" with rollout.vllm'),
        ((*SHARED, "rollout.vllm.cache_gb=null"), r"rollout\.vllm\.cache_gb says how much"),
        ((VLLM, "resources.rollout.gpus=0.5"), r"gpus = 0\.5 shares a GPU"),
    ],
)
def test_an_engine_that_cannot_have_what_it_wants_is_refused(tmp_path: Path, changes: tuple[str, ...], says: str):
    config = make_config(*changes, model=save_tiny_model(tmp_path, seed=0))
    with pytest.raises(PlanError, match=says):
        plan(config)


def test_an_engine_on_two_gpus_is_placed_with_both(tmp_path: Path):
    two = (*GPUS, "rollout.vllm.tensor_parallel=2", "resources.rollout.gpus=2")
    config = make_config(*two, model=save_tiny_model(tmp_path, seed=0))
    assert Placement.of(config).worker == {"GPU": 2.0}
    assert "rollout: 1 worker with 2 GPU" in plan(config).asks


def test_the_plan_says_that_ray_knows_nothing_of_the_runs_own_teacher(tmp_path: Path):
    own = ("teacher={kind: server, model: models/teacher}", "rollout.source=teacher", VLLM)
    model = save_tiny_model(tmp_path, seed=0)
    asking, other = (plan(make_config(*own, *changes, model=model)) for changes in (GPUS, ()))
    assert [note for note in asking.notes if note not in other.notes] == [
        "Ray knows nothing of the teacher that this run starts: it uses the first GPU, whoever holds that"
    ]


def test_a_node_without_the_runs_folder_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot enter .*nowhere \(No such file or directory\): .* all nodes share"):
        enter(None, str(tmp_path / "nowhere"))
