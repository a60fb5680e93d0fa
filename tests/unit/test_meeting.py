"""A run meets its teachers before anything else: probed where they were there already, refused with the reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.teachers import Faculty, teachers
from potstill.algebra.objective import Tier
from potstill.config import RunConfig
from potstill.errors import PlanError, TeacherRefused
from tests.endpoint_models import law, vllm
from tests.endpoints import Said, scripted
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "student", seed=0)


async def meet(student: Path, answer: Callable[[str, Any], Said], *, method: str = "opd_sampled") -> Faculty:
    with scripted(answer) as server:
        config = RunConfig.model_validate(
            {
                "name": "one",
                "method": method,
                "student": {"model": str(student)},
                "teacher": {"kind": "vllm", "url": server.url, "model": "big"},
                "data": {"kind": "jsonl", "path": "data.jsonl"},
                "rollout": {"prompts_per_step": 2, "max_prompt_tokens": 32, "sampling": {"max_new_tokens": 4}},
                "optim": {"lr": 1e-4},
                "loop": {"steps": 3},
            }
        )
        async with teachers(config, student, {}) as faculty:
            return faculty


async def test_a_sound_teacher_is_met_with_what_was_found_of_it(student: Path):
    started = time.perf_counter()
    faculty = await meet(student, vllm())
    assert time.perf_counter() - started < 10
    found = faculty.probed["teacher"]
    assert (found.tier, found.problems) == (Tier.SAMPLED, ())  # no more than the method reads
    event = found.as_event()
    assert event["identity"]["name"] == "big"
    assert event["tier"] == "SAMPLED"
    assert event["noise"] == 0
    assert event["latency_ms"] > 0
    assert found.headline == "big gives SAMPLED"


async def test_a_teacher_that_does_not_read_its_context_is_refused_before_the_run(student: Path):
    def forgetful(prefix: tuple[int, ...]) -> np.ndarray:
        return law(prefix[-1:])

    def blind(prefix: tuple[int, ...]) -> np.ndarray:
        return law((len(prefix),))

    assert (await meet(student, vllm(law=forgetful))).probed  # one token back is some context
    with pytest.raises(TeacherRefused, match=r"teacher at http://127.0.0.1:\d+: context_effect 0 nats.* does not read"):
        await meet(student, vllm(law=blind))


async def test_a_teacher_that_claims_what_it_does_not_give_is_refused_for_the_method_that_reads_it(student: Path):
    with pytest.raises(PlanError, match="needs a teacher of tier IDS, big offers TOPK"):
        await meet(student, vllm(), method="opd")
