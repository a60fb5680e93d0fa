"""What a teacher is loaded from, what it refuses, and that company, shared contexts and pushes change no score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen3Config

from potstill.errors import ConfigError, WeightsError
from potstill.types import ScoreStatus
from potstill.wire import MISSING_HALF, Ask
from teacher_server.batches import tokens_read
from teacher_server.batching import Job
from teacher_server.engine import ScoringTeacher, head_id, weights_digest
from teacher_server.transformers_backbone import TransformersBackbone, can_share, passes
from tests.builders_teacher import NOTHING_MORE, ids
from tests.tiny_models import VOCABULARY, save_tiny_model, tiny_tokenizer


def teacher(folder: Path, dtype: str = "float32") -> ScoringTeacher:
    return ScoringTeacher(TransformersBackbone(folder, dtype=dtype), folder, name="tiny")


def job(
    *, context: Sequence[int] = (1,), length: int = 4, first: int = 0, seed: int = 0, ask: Ask = NOTHING_MORE
) -> Job:
    completion = np.arange(first, first + length, dtype=np.int32)
    return Job(
        input_ids=np.concatenate([ids(*context), completion[:-1]]),
        completion_ids=completion,
        token_ids=None,
        ask=ask,
        seed=seed,
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("engine"), seed=1)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def edit(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_sound_folder_says_what_it_is(folder):
    loaded = teacher(folder)
    assert loaded.identity.revision == weights_digest(folder)
    assert (loaded.vocabulary, loaded.context_length) == (VOCABULARY, 512)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.3)])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads_score_as_the_plain_forward_does(tmp_path, tied, dtype, tolerance):
    folder = save_tiny_model(tmp_path, seed=2, tie_word_embeddings=tied)
    (scores,) = teacher(folder, dtype).score([job(length=12)])
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.inference_mode():
        logprobs = exact(torch.tensor([[1, *range(12)]])).logits[0].log_softmax(-1)
    np.testing.assert_allclose(scores.sampled, logprobs[torch.arange(12), torch.arange(12)], atol=tolerance)


def test_one_changed_byte_of_the_weights_is_another_revision(folder):
    before = weights_digest(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert weights_digest(folder) != before


def test_truncated_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="not a causal language model"):
        teacher(folder)


def test_weights_that_are_not_safetensors_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*.safetensors"):
        teacher(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_folder_that_brings_code_is_refused(folder, file):
    edit(folder / file, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ConfigError, match="auto_map"):
        teacher(folder)


def test_a_folder_without_a_chat_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="chat template"):
        teacher(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(ConfigError, match="no tokenizer"):
        teacher(folder)


def test_tensors_that_the_weights_lack_are_never_made_up(folder):
    edit(folder / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(ConfigError, match="lack"):
        teacher(folder)


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tmp_path):
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="after the head"):
        teacher(tmp_path)


def damage(folder: Path, tensor: str, row: int) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights[tensor][row] = torch.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_give_no_numbers_at_all_are_refused(folder):
    damage(folder, "model.norm.weight", 0)
    with pytest.raises(ConfigError, match="not finite"):
        teacher(folder)


def test_a_job_without_finite_numbers_is_failed_and_nan_and_its_neighbour_is_not(folder):
    damage(folder, "model.embed_tokens.weight", 20)  # only a completion that reaches token 20 reads this row
    hit, spared = teacher(folder).score(
        [job(length=30, ask=Ask(top_k=2, entropy=True, draws=3, hidden=64)), job(length=10)]
    )
    assert (hit.status, spared.status) == (ScoreStatus.FAILED, ScoreStatus.OK)
    for array in (hit.sampled, hit.topk_logprobs, hit.topk_tail, hit.entropy, hit.drawn_logprobs):
        assert np.isnan(array).all()
    assert (hit.hidden == MISSING_HALF).all()
    assert np.isfinite(spared.sampled).all()


def test_jobs_that_ask_for_different_things_share_a_batch(sound):
    loaded = teacher(sound)
    asks = [Ask(top_k=2), Ask(), Ask(top_k=2), Ask(entropy=True), Ask(hidden=64)]
    jobs = [job(length=length, ask=ask) for length, ask in zip([3, 5, 2, 4, 7], asks, strict=True)]
    for asked, scores in zip(jobs, loaded.score(jobs), strict=True):
        (alone,) = loaded.score([asked])
        np.testing.assert_allclose(scores.sampled, alone.sampled, atol=1e-5)
        assert (scores.topk_ids is not None) == (asked.ask.top_k > 0)
        assert (scores.entropy is not None) == asked.ask.entropy
        assert (scores.hidden is not None) == (asked.ask.hidden > 0)


def test_draws_are_of_a_jobs_own_seed_whatever_its_company(sound):
    loaded = teacher(sound)
    jobs = [job(length=20, seed=seed, first=seed, ask=Ask(top_k=3, draws=8)) for seed in (5, 6, 7)]
    together = loaded.score(jobs)
    for asked, scores in zip(jobs, together, strict=True):
        np.testing.assert_array_equal(scores.drawn_ids, loaded.score([asked])[0].drawn_ids)
    (other,) = loaded.score([job(length=20, seed=50, first=5, ask=Ask(top_k=3, draws=8))])
    assert (other.drawn_ids != together[0].drawn_ids).any()


# -------------------------------------------------------------------------------------------- contexts in common


def test_shared_contexts_change_no_score_beyond_float32_rounding(sound):
    loaded = teacher(sound)
    contexts = [range(90), range(5, 140), range(3), range(90, 120)]
    jobs = [
        job(context=context, length=length, first=first)
        for context in contexts
        for first, length in ((0, 1), (7, 30), (60, 12), (100, 2))
    ]
    jobs = [jobs[index] for index in np.random.default_rng(0).permutation(len(jobs))]
    assert tokens_read(jobs) < sum(len(one.input_ids) for one in jobs)
    for asked, scores in zip(jobs, loaded.score(jobs), strict=True):
        (alone,) = loaded.score([asked])
        np.testing.assert_allclose(scores.sampled, alone.sampled, atol=1e-5)


def test_a_context_is_read_once_when_only_first_tokens_are_scored(sound):
    loaded = teacher(sound)
    jobs = [job(context=range(50), length=1, first=first) for first in range(5)]
    assert tokens_read(jobs) < sum(len(one.input_ids) for one in jobs)
    for asked, scores in zip(jobs, loaded.score(jobs), strict=True):
        np.testing.assert_allclose(scores.sampled, loaded.score([asked])[0].sampled, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, True),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, False),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, False),
    ],
)
def test_models_whose_keys_depend_on_what_follows_share_no_context(settings, shares):
    assert can_share(Qwen3Config(num_hidden_layers=2, **settings)) is shares


def test_a_window_is_respected_in_jobs_of_one_context(tmp_path):
    folder = save_tiny_model(tmp_path, seed=4)
    window = {"sliding_window": 6, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
    edit(folder / "config.json", **window)
    loaded = teacher(folder)
    jobs = [job(context=range(60), length=20, first=first) for first in (0, 30, 60)]
    for asked, scores in zip(jobs, loaded.score(jobs), strict=True):
        np.testing.assert_allclose(scores.sampled, loaded.score([asked])[0].sampled, atol=1e-5)


def test_passes_are_of_neighbours_and_within_their_size():
    assert passes([3, 3, 4, 9, 1, 1], 8) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]
    assert passes([], 8) == []


# ---------------------------------------------------------------------------------------------------- new weights


@pytest.mark.parametrize("tied", [False, True])
def test_new_weights_make_another_teacher_of_the_same_name(tmp_path, tied):
    old = save_tiny_model(tmp_path / "old", seed=1, tie_word_embeddings=tied)
    new = save_tiny_model(tmp_path / "new", seed=2, tie_word_embeddings=tied)
    loaded, wanted = teacher(old), teacher(new)
    loaded.load_weights(safetensors.torch.load_file(new / "model.safetensors"), revision="v7")
    np.testing.assert_array_equal(loaded.score([job()])[0].sampled, wanted.score([job()])[0].sampled)
    assert (loaded.identity.revision, loaded.identity.name) == ("v7", "tiny")
    assert loaded.head_id == wanted.head_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "model.norm.weight"),
        ({"model.extra": torch.zeros(1)}, "model.extra"),
        ({"model.norm.weight": torch.zeros(3)}, r"has shape \[3\], the model's has \[64\]"),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_is_touched(sound, change, message):
    loaded = teacher(sound)
    (before,), weights = loaded.score([job()]), safetensors.torch.load_file(sound / "model.safetensors")
    zeroed = {name: torch.zeros_like(tensor) for name, tensor in weights.items()} | change
    with pytest.raises(WeightsError, match=message):
        loaded.load_weights({name: t for name, t in zeroed.items() if t is not None}, revision="v2")
    np.testing.assert_array_equal(loaded.score([job()])[0].sampled, before.sampled)
    assert loaded.identity.revision == weights_digest(sound)


def test_a_heads_id_is_of_its_numbers_not_of_their_precision():
    head = torch.randn(5000, 4).to(torch.bfloat16)
    assert head_id(head) == head_id(head.float())
    changed = head.clone()
    changed[4999, 3] += 1
    assert head_id(changed) != head_id(head)
