"""A checkpoint continues the run bit for bit, loads anywhere, and is refused when one bit of it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner import checkpoint
from learner.packing import pack
from learner.trainer import Trainer
from orchestrator.run import last_checkpoint
from potstill import manifest
from potstill.errors import ConfigError, RunError
from potstill.journal import KEPT
from tests.checkpoints import RUNS, make_trainer, save, save_students, train
from tests.disks import flip_a_bit
from tests.trainers import plain_logits, same, weights_of

every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
PROMPT, COMPLETION = [72, 105, 33], [66, 121, 101, 33]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_students(tmp_path_factory.mktemp("models"))


@pytest.fixture
def saved(models: Path, tmp_path: Path) -> Path:
    """A checkpoint after one step."""
    trainer = train(make_trainer(models / "untied", **RUNS["adapter, ema"]), 1, 1)
    return save(trainer, tmp_path / "step-000001", models / "untied")


def student_logits(trainer: Trainer) -> torch.Tensor:
    packed = pack([np.array(PROMPT)], [np.array(COMPLETION)], [np.ones(len(COMPLETION), bool)])
    return (trainer.student(packed) @ trainer.student.head.T).detach()


@every_run
@pytest.mark.parametrize("model", ["untied", "tied"])
def test_a_restored_run_continues_bit_for_bit(run: dict[str, Any], model: str, models: Path, tmp_path: Path) -> None:
    through = train(make_trainer(models / model, **run), 1, 3)
    folder = save(through, tmp_path / "step-000003", models / model)
    train(through, 4, 5)

    resumed = make_trainer(models / model, **run)
    checkpoint.restore(resumed, folder)
    assert resumed.version == 3
    train(resumed, 4, 5)
    assert same(weights_of(through.student), weights_of(resumed.student))
    assert same(through.inner.state(), resumed.inner.state())
    assert through.schedules.state() == resumed.schedules.state()


def test_learned_weights_of_teachers_continue_bit_for_bit(models: Path, tmp_path: Path) -> None:
    teachers = [{"model": str(models / name)} for name in ("untied", "tied")]
    teacher = {"kind": "local", "models": teachers, "learn_weights": 100.0}
    run: dict[str, Any] = {"method": "multi_teacher", "teacher": teacher}
    through = train(make_trainer(models / "tied", **run), 1, 3)
    folder = save(through, tmp_path / "step-000003", models / "tied")
    kept = through.weighing.state()
    train(through, 4, 5)

    resumed = make_trainer(models / "tied", **run)
    checkpoint.restore(resumed, folder)
    assert kept.keys() == {"untied", "tied"}
    assert same(kept, resumed.weighing.state())
    train(resumed, 4, 5)
    assert same(weights_of(through.student), weights_of(resumed.student))
    assert same(through.weighing.state(), resumed.weighing.state())
    assert not same(kept, resumed.weighing.state())

    run["teacher"] = {**teacher, "learn_weights": None}
    with pytest.raises(ConfigError, match="learned weights of teachers, this run has none"):
        checkpoint.restore(make_trainer(models / "tied", **run), folder)


def test_without_the_optimizers_state_it_would_not(models: Path, tmp_path: Path) -> None:
    """The test above can fail."""
    through = train(make_trainer(models / "untied", **RUNS["all weights"]), 1, 3)
    folder = save(through, tmp_path / "step-000003", models / "untied")
    train(through, 4, 5)
    resumed = make_trainer(models / "untied", **RUNS["all weights"])
    checkpoint.restore(resumed, folder)
    resumed.optimizer.state.clear()
    train(resumed, 4, 5)
    assert not same(weights_of(through.student), weights_of(resumed.student))


def test_what_the_run_wants_back_comes_back(models: Path, tmp_path: Path) -> None:
    trainer = make_trainer(models / "untied")
    folder = save(trainer, tmp_path / "step-000000", models / "untied", cursor=17, counts={"tokens": 5})
    assert checkpoint.restore(make_trainer(models / "untied"), folder) == {"cursor": 17, "counts": {"tokens": 5}}


def test_a_checkpoint_before_the_first_step_continues_like_a_new_run(models: Path, tmp_path: Path) -> None:
    new = make_trainer(models / "untied", **RUNS["all weights"])
    folder = save(new, tmp_path / "step-000000", models / "untied")
    resumed = make_trainer(models / "untied", **RUNS["all weights"])
    checkpoint.restore(resumed, folder)
    assert same(weights_of(train(new, 1, 2).student), weights_of(train(resumed, 1, 2).student))


def test_a_parameter_that_never_had_a_gradient_is_no_obstacle(models: Path, tmp_path: Path) -> None:
    def with_idle_parameter() -> Trainer:
        trainer = make_trainer(models / "untied", **RUNS["all weights"])
        trainer.student.network.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
        return trainer

    folder = save(train(with_idle_parameter(), 1, 1), tmp_path / "step-000001", models / "untied")
    resumed = with_idle_parameter()
    checkpoint.restore(resumed, folder)
    train(resumed, 2, 2)
    assert resumed.version == 2


@pytest.mark.parametrize("run", ["all weights", "adapter"])
@pytest.mark.parametrize("model", ["untied", "tied"])
def test_a_saved_model_loads_in_plain_transformers(run: str, model: str, models: Path, tmp_path: Path) -> None:
    trainer = train(make_trainer(models / model, **RUNS[run]), 1, 2)
    folder = save(trainer, tmp_path / "step-000002", models / model)
    plain, report = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert plain.config._attn_implementation != "packed"
    torch.testing.assert_close(student_logits(trainer), plain_logits(plain, PROMPT, COMPLETION), rtol=1e-4, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(models / model)
    assert (plain_logits(plain, PROMPT, COMPLETION) - plain_logits(base, PROMPT, COMPLETION)).abs().max() > 1e-2


def test_a_saved_model_has_its_tokenizer_chat_template_and_card(saved: Path, models: Path) -> None:
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (saved / "model", models / "untied")]
    ours, original = (t.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) for t in tokenizers)
    assert ours == original
    assert (saved / "model" / "README.md").read_text() == "# A student\n"


def test_a_saved_adapter_on_its_base_is_the_saved_model(saved: Path, models: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(models / "untied")
    adapted = PeftModel.from_pretrained(base, str(saved / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(saved / "model")
    torch.testing.assert_close(
        plain_logits(adapted, PROMPT, COMPLETION), plain_logits(merged, PROMPT, COMPLETION), rtol=1e-4, atol=1e-5
    )


def test_nothing_in_a_checkpoint_is_a_pickle(saved: Path) -> None:
    suffixes = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md", ".jinja"}
    assert load_file(saved / "trainer" / "optimizer.safetensors")


def test_the_manifest_names_every_file_and_the_step(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert manifest["files"].keys() == files - {"manifest.json"}
    assert manifest["step"] == 1


def listed(folder: Path) -> list[Path]:
    return [folder / name for name in json.loads((folder / "manifest.json").read_text())["files"]]


def test_one_flipped_bit_in_any_file_is_refused_by_name(saved: Path) -> None:
    for path in listed(saved):
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(ConfigError, match=f"{path.relative_to(saved)} is damaged"):
            manifest.verify(saved)
        path.write_bytes(content)
    manifest.verify(saved)


def test_any_missing_file_is_refused_by_name(saved: Path) -> None:
    for path in listed(saved):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ConfigError, match=f"{path.relative_to(saved)} is missing"):
            manifest.verify(saved)
        path.write_bytes(content)


def test_a_damaged_checkpoint_restores_nothing(saved: Path, models: Path) -> None:
    path = saved / "trainer" / "teacher.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    trainer = make_trainer(models / "untied", **RUNS["adapter, ema"])
    before = weights_of(trainer.student)
    with pytest.raises(ConfigError, match=r"trainer/teacher\.safetensors is damaged"):
        checkpoint.restore(trainer, saved)
    assert same(before, weights_of(trainer.student))
    assert trainer.version == 0


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{}"])
def test_a_manifest_that_cannot_be_read_is_refused(saved: Path, content: bytes) -> None:
    (saved / "manifest.json").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        manifest.verify(saved)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        manifest.verify(tmp_path)


def test_a_sound_checkpoint_is_never_overwritten(saved: Path, models: Path) -> None:
    before = manifest.digest(saved)
    assert save(make_trainer(models / "untied"), saved, models / "untied", cursor=99) == saved
    assert manifest.digest(saved) == before


def test_a_damaged_one_is_set_aside_for_another_and_removed_with_the_old(saved: Path, models: Path) -> None:
    flip_a_bit(saved / "trainer" / "optimizer.safetensors")
    trainer = train(make_trainer(models / "untied", **RUNS["all weights"]), 1, 1)
    manifest.verify(save(trainer, saved, models / "untied"))
    assert {path.name for path in saved.parent.iterdir()} == {"step-000001", "step-000001.damaged"}
    checkpoint.prune(saved.parent, keep=2)
    assert [path.name for path in saved.parent.iterdir()] == ["step-000001"]


def test_a_save_that_fails_midway_leaves_nothing_visible_and_can_be_repeated(models: Path, tmp_path: Path) -> None:
    trainer, folder = make_trainer(models / "untied"), tmp_path / "step-000000"
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(trainer, folder, models / "untied", cursor=object())
    assert list(tmp_path.glob("step-*")) == []
    checkpoint.prune(tmp_path, keep=1)
    manifest.verify(save(trainer, folder, models / "untied"))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000"]


def test_pruning_keeps_the_newest_and_touches_nothing_else(tmp_path: Path) -> None:
    names = ["step-000002", "step-000010", "step-000009", "step-000100", "best", ".step-000101.77"]
    for name in names:
        (tmp_path / name / "model").mkdir(parents=True)
    checkpoint.prune(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000010", "step-000100", "best", ".step-000101.77"}
    checkpoint.prune(tmp_path, keep=5)
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_pruning_spares_what_another_run_begins_with(tmp_path: Path) -> None:
    for step in range(4):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-000001" / KEPT).touch()
    checkpoint.prune(tmp_path, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "step-000003"}


def test_the_newest_checkpoint_has_the_highest_number_even_where_names_outgrow_their_padding(tmp_path: Path) -> None:
    parent = tmp_path / "checkpoints"
    for name in ("step-1000000", "step-999998", "step-999999"):
        (parent / name / "model").mkdir(parents=True)
    assert last_checkpoint(tmp_path) == parent / "step-1000000" / "model"
    checkpoint.prune(parent, keep=2)
    assert {path.name for path in parent.iterdir()} == {"step-999999", "step-1000000"}


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no checkpoint"):
        last_checkpoint(tmp_path)
