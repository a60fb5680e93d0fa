"""What TransformersTeacher refuses to load, and what it does with weights that give no numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from potstill.errors import ConfigError
from potstill.types import ScoreStatus
from teacher_server.batching import Job, cut
from teacher_server.engine import TransformersTeacher, weights_digest
from tests.builders_teacher import ids
from tests.tiny_models import VOCABULARY, save_tiny_model, tiny_tokenizer


def teacher(folder: Path) -> TransformersTeacher:
    return TransformersTeacher(folder, name="tiny", dtype="float32")


def job(*, length: int = 4, top_k: int = 0, entropy: bool = False) -> Job:
    completion = np.arange(length, dtype=np.int32)
    return Job(
        input_ids=np.concatenate([ids(1), completion[:-1]]),
        completion_ids=completion,
        token_ids=None,
        top_k=top_k,
        entropy=entropy,
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
    (scores,) = TransformersTeacher(folder, name="tiny", dtype=dtype).score([job(length=12)])
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
    hit, spared = teacher(folder).score([job(length=30, top_k=2, entropy=True), job(length=10)])
    assert (hit.status, spared.status) == (ScoreStatus.FAILED, ScoreStatus.OK)
    for array in (hit.sampled, hit.topk_logprobs, hit.topk_tail, hit.entropy):
        assert np.isnan(array).all()
    assert np.isfinite(spared.sampled).all()


def test_jobs_that_ask_for_different_things_share_a_batch(sound):
    loaded = teacher(sound)
    jobs = [job(length=3, top_k=2), job(length=5), job(length=2, top_k=2), job(length=4, entropy=True)]
    for asked, scores in zip(jobs, loaded.score(jobs), strict=True):
        (alone,) = loaded.score([asked])
        np.testing.assert_allclose(scores.sampled, alone.sampled, atol=1e-5)
        assert (scores.topk_ids is not None) == (asked.top_k > 0)
        assert (scores.entropy is not None) == asked.entropy


def test_a_cut_keeps_every_job_once_and_every_padded_batch_under_its_budget():
    lengths = [5, 1, 9, 3, 3, 20, 2, 8]
    batches = cut([job(length=length) for length in lengths], 12)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[index] for index in batch) * len(batch) <= 12
