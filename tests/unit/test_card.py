"""A model card has a head that hubs read and says where the weights come from, without secrets."""

from __future__ import annotations

import pytest
import yaml

from orchestrator.card import model_card
from potstill.config import RunConfig
from potstill.config_file import parse


def make_config(*, name: str = "one") -> RunConfig:
    return parse(
        {
            "name": name,
            "seed": 11,
            "method": "gkd",
            "student": {"model": "models/student"},
            "teacher": {"kind": "server", "url": "http://127.0.0.1:8001", "secret_ref": "env:KEY"},
            "data": {"kind": "jsonl", "path": "data.jsonl"},
            "rollout": {"prompts_per_step": 1, "sampling": {"max_new_tokens": 4}},
            "optim": {"lr": 1e-4},
            "loop": {"steps": 3},
        }
    )


def test_the_head_is_yaml_that_names_base_model_and_method():
    card = model_card(make_config(), step=3, tokens_trained=1234, accuracy={})
    empty, head, body = card.split("---\n", 2)
    assert empty == ""
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "models/student",
        "tags": ["on-policy-distillation", "potstill", "gkd"],
    }
    assert body.strip().startswith("# one")


@pytest.mark.parametrize(
    "said", ["3 steps, 1,234 tokens, seed 11", "arXiv 2306.13649", "http://127.0.0.1:8001", "data.jsonl", "env:KEY"]
)
def test_the_card_says_where_the_weights_come_from(said: str):
    assert said in model_card(make_config(), step=3, tokens_trained=1234, accuracy={})


def test_an_accuracy_is_given_only_where_it_was_measured():
    unmeasured = model_card(make_config(), step=3, tokens_trained=1, accuracy={})
    measured = model_card(make_config(), step=3, tokens_trained=1, accuracy={"before": 0.125, "after": 0.5})
    assert "| Held-out accuracy | not measured |" in unmeasured
    assert "| Held-out accuracy | before 12.5%, after 50.0% |" in measured
