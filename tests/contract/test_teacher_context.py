"""A run meets its teacher server, a real one: the longest text of the run must fit what the teacher reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.launch import teacher
from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.errors import ConfigError
from tests.builders_teacher import KEY, ServerProcess, teacher_server
from tests.tiny_models import save_tiny_model

CONTEXT = 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = save_tiny_model(tmp_path_factory.mktemp("teacher") / "tiny", seed=3, max_positions=CONTEXT)
    with teacher_server(folder) as running:
        yield running


def config_for(server: ServerProcess, folder: Path, *, max_prompt_tokens: int, max_new_tokens: int) -> RunConfig:
    (folder / "key").write_text(KEY)
    return parse(
        {
            "name": "one",
            "method": "opd_sampled",
            "student": {"model": "unused"},
            "teacher": {"kind": "server", "url": server.url, "secret_ref": f"file:{folder / 'key'}"},
            "data": {"kind": "jsonl", "path": "unused"},
            "rollout": {
                "prompts_per_step": 1,
                "max_prompt_tokens": max_prompt_tokens,
                "sampling": {"max_new_tokens": max_new_tokens},
            },
            "optim": {"lr": 1e-4},
            "loop": {"steps": 1},
        }
    )


async def test_a_teacher_whose_context_is_just_filled_by_the_longest_text_is_met(server, tmp_path):
    config = config_for(server, tmp_path, max_prompt_tokens=24, max_new_tokens=CONTEXT - 24)
    async with teacher(config, tmp_path / "teacher.log") as address:
        assert address is not None
        assert (address.url, address.identity.name) == (server.url, "tiny")


async def test_a_teacher_that_cannot_read_the_longest_text_is_refused_with_both_numbers(server, tmp_path):
    config = config_for(server, tmp_path, max_prompt_tokens=24, max_new_tokens=CONTEXT - 23)
    says = r"tiny reads 40 tokens.*max_prompt_tokens 24 .*rollout\.sampling\.max_new_tokens 17, which make 41"
    with pytest.raises(ConfigError, match=says):
        async with teacher(config, tmp_path / "teacher.log"):
            pass
