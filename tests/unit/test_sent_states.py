"""A teacher whose states are sent teaches as it would inside the learner, up to the rounding of its states."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from learner import canaries
from learner.inner_teacher import InnerTeacher, Member
from learner.logprobs import Tally
from learner.model import CausalModel, load_student
from learner.packing import Packed, pack
from learner.sent_states import SentStates, as_bits, as_tensor, find_head
from learner.trainer import Masks, Trainer
from potstill.algebra.objective import Tier
from potstill.errors import AlignmentError, ConfigError, RunError
from potstill.methods import PRESETS
from potstill.types import Rollout, ScoredRollout, ScoreStatus
from potstill.wire import MISSING_HALF, Ask, Capabilities, unscored
from rollout_worker.scoring import asked, support_k
from teacher_server.batching import Job
from teacher_server.engine import ScoringTeacher
from teacher_server.transformers_backbone import TransformersBackbone
from tests.presets import EVERY, Batch, assert_same, batch_for, changed, computed, make_batch, shrunk
from tests.rollouts import IDENTITY, make_rollout
from tests.tiny_models import VOCABULARY as BYTES
from tests.tiny_models import save_tiny_model
from tests.trainers import make_config, make_student

WIDTH = 16  # of the states of tests.trainers' networks
TEACHER = make_student(seed=1)
SERVER = {"kind": "server", "model": "unused"}
READS_MORE = {**SERVER, "privileged_template": "{prompt} {answer}"}
FULL = [name for name, objective in EVERY.items() if objective.tier is Tier.FULL]
GOLD = {"over": "student", "auxiliaries": {"gold": {"over": "others", "loss": "likelihood"}}}
CPU = torch.device("cpu")


def states_of(model: CausalModel, rollout: Rollout, *, privileged: bool) -> Tensor:
    """[T, H] before every completion token."""
    context = rollout.teacher_context_ids if privileged else rollout.prompt_ids
    with torch.no_grad():
        return model(pack([context], [rollout.completion_ids], [np.ones_like(rollout.loss_mask)]))


def sent(batch: Batch, *, privileged: bool = False) -> Batch:
    """The batch as the teacher scores it that is asked for its states."""
    states = [as_bits(states_of(TEACHER, scored.rollout, privileged=privileged)) for scored in batch]
    return [changed(scored, scores={"hidden": own}) for scored, own in zip(batch, states, strict=True)]


def see(packed: Packed) -> tuple[Tensor, Tensor]:
    return TEACHER(packed), TEACHER.head


def see_rounded(packed: Packed) -> tuple[Tensor, Tensor]:
    return TEACHER(packed).to(torch.bfloat16).double(), TEACHER.head


def trainer_of(
    name: str = "gkd",
    *,
    teacher: Mapping[str, Any] = SERVER,
    objective: Mapping[str, Any] | None = None,
    kind: type[Trainer] = Trainer,
    **learner: int,
) -> Trainer:
    changes = {**shrunk(PRESETS[name].objective), **(objective or {})}
    config = make_config(method=name, objective=changes, teacher=teacher, learner=learner, steps=1000)
    return kind(config, make_student(), SentStates(TEACHER.head))


def failed(scored: ScoredRollout) -> ScoredRollout:
    ask = Ask(hidden=WIDTH)
    scores = unscored(IDENTITY, ScoreStatus.FAILED, num_tokens=len(scored.rollout.completion_ids), ask=ask)
    return ScoredRollout(rollout=scored.rollout, scores=scores)


@pytest.mark.parametrize("name", FULL)
def test_every_method_that_reads_all_logits_learns_from_states_what_it_learns_from_a_model(name: str) -> None:
    batch, trainer = batch_for(name), trainer_of(name, teacher=READS_MORE)
    found = computed(trainer, sent(batch, privileged=True))
    assert found[1].norm() > 0
    trainer.teacher = InnerTeacher([Member(see=see_rounded)], privileged=True)
    assert_same(found, computed(trainer, batch))


def test_the_rounding_of_states_moves_loss_and_gradient_by_less_than_two_thousandths() -> None:
    batch, trainer = make_batch(), trainer_of("opd_full")
    loss, gradient = computed(trainer, sent(batch))
    trainer.teacher = InnerTeacher([Member(see=see)])
    exact_loss, exact_gradient = computed(trainer, batch)
    assert 0 < abs(loss - exact_loss) < 2e-3 * abs(exact_loss)
    assert (gradient - exact_gradient).norm() < 2e-3 * exact_gradient.norm()


def test_bits_are_those_of_the_nearest_bfloat16() -> None:
    states = torch.randn(5, 3)
    assert torch.equal(as_tensor(as_bits(states)), states.to(torch.bfloat16))
    assert as_tensor(np.full((1, 1), MISSING_HALF, np.uint16)).isnan().all()


# ------------------------------------------------------------------------------------------------ what is missing


def test_a_rollout_that_failed_is_not_trained_on_and_changes_nothing_for_the_others() -> None:
    batch, trainer = sent(make_batch()), trainer_of()
    with_failed = [failed(batch[0]), *batch[1:]]
    masks = trainer.masks(with_failed)
    assert [bool(mask.any()) for mask in masks] == [False] + [True] * (len(batch) - 1)
    assert_same(computed(trainer, with_failed), computed(trainer, batch[1:]))


@pytest.mark.parametrize("tokens", [1, 1000], ids=["alone", "together"])
def test_text_that_no_term_compares_with_the_teacher_needs_no_states(tokens: int) -> None:
    batch, trainer = sent(make_batch()), trainer_of(objective=GOLD, micro_batch_tokens=tokens)
    unasked = [dataclasses.replace(s, scores=None) if s.rollout.origin == "others" else s for s in batch]
    assert_same(computed(trainer, unasked), computed(trainer, batch))


@pytest.mark.parametrize(
    ("width", "says"), [(0, "has no states; the head reads 16"), (9, r"has states \(9,\) wide; the head reads 16")]
)
def test_scores_without_states_of_the_heads_width_are_refused_by_the_rollouts_name(width: int, says: str) -> None:
    batch = sent(make_batch())
    hidden = batch[0].scores.hidden[:, :width] if width else None
    batch[0] = changed(batch[0], scores={"hidden": hidden})
    with pytest.raises(AlignmentError, match=f"rollout p0/0 {says}"):
        computed(trainer_of(), batch)


def test_states_for_another_number_of_tokens_are_refused() -> None:
    batch = sent(make_batch())
    batch[0] = changed(batch[0], scores={"hidden": np.zeros((99, WIDTH), np.uint16)})
    with pytest.raises(AlignmentError, match=r"rollout p0/0: scores\.hidden has 99 rows"):
        computed(trainer_of(), batch)


# --------------------------------------------------------------------------------------------------- the canaries


class OneTokenOff(Trainer):
    """Reads each token's states one place too early."""

    def accumulate(self, batch: Batch, masks: Masks, *rest: Any, step: int) -> Tally:
        off = [changed(scored, scores={"hidden": np.roll(scored.scores.hidden, 1, axis=0)}) for scored in batch]
        return super().accumulate(off, masks, *rest, step=step)


def students_own(batch: Batch) -> Batch:
    """With the log-probs that the student of these tests really has, as its sampler would report them."""
    own = []
    for scored in batch:
        logprobs = (states_of(make_student(), scored.rollout, privileged=False) @ make_student().head.T).log_softmax(-1)
        written = torch.from_numpy(scored.rollout.completion_ids).long()[:, None]
        own.append(changed(scored, student_logprobs=logprobs.detach().gather(-1, written)[:, 0].numpy()))
    return own


@pytest.mark.parametrize("name", ["gkd", "opd_full"])
def test_the_canaries_live_on_states_and_die_of_states_one_token_off(name: str) -> None:
    batch = students_own(sent([scored for scored in make_batch() if scored.rollout.origin == "student"]))
    trainer = trainer_of(name)
    teacher = trainer.teacher
    found = canaries.check(trainer, batch)
    assert abs(found["mirror_loss"]) < 1e-5
    assert found["scramble_change"] > 0.1
    assert trainer.teacher is teacher
    with pytest.raises(RunError, match="student against itself"):
        canaries.check(trainer_of(name, kind=OneTokenOff), batch)


# ------------------------------------------------------------------------------------------------------- the head


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("heads")
    save_tiny_model(parent / "student", seed=0, layers=1)
    save_tiny_model(parent / "teacher", seed=1, hidden=96, layers=1)
    save_tiny_model(parent / "tied", seed=2, layers=1, tie_word_embeddings=True)
    save_tiny_model(parent / "padded", seed=3, layers=1, vocab_size=BYTES + 5)
    return parent


def met(folder: Path, *, dtype: str = "float32") -> Capabilities:
    """What a teacher server of this folder says of itself."""
    serving = ScoringTeacher(TransformersBackbone(folder, dtype=dtype), folder, name="tiny")
    return Capabilities(
        model="tiny",
        revision="r1",
        tokenizer_fingerprint="f1",
        tier=Tier.FULL,
        context_length=serving.context_length,
        vocabulary=serving.vocabulary,
        max_items=1,
        max_tokens=512,
        max_top_k=128,
        max_body_bytes=2**20,
        hidden_size=serving.hidden_size,
        head_id=serving.head_id,
    )


def opened(folders: Path, served: str, *, head: str | None = None, dtype: str = "float32") -> SentStates | None:
    """For a student of gkd and a server of the folder `served`, whose head the config says is in `head`."""
    named = {"url": "http://127.0.0.1:1", "secret_ref": "env:KEY", "head": str(folders / (head or served))}
    config = make_config(method="gkd", student={"model": str(folders / "student")}, teacher={"kind": "server", **named})
    student = load_student(config.student, seed=0, device=CPU)
    return SentStates.of(config, met(folders / served, dtype=dtype), student)


def test_states_of_a_server_give_the_logits_of_its_model(folders: Path) -> None:
    folder = folders / "teacher"
    serving = ScoringTeacher(TransformersBackbone(folder, dtype="float32"), folder, name="tiny")
    ids = np.random.default_rng(0).integers(0, BYTES, 320).astype(np.int32)
    jobs = [Job(input_ids=ids[:-1], completion_ids=ids[64:], token_ids=None, ask=Ask(hidden=96), seed=0)]
    (scores,) = serving.score(jobs)
    rollout = make_rollout(prompt=ids[:64], completion=ids[64:])
    teacher = opened(folders, "teacher")
    assert teacher is not None
    logits = teacher.read([ScoredRollout(rollout=rollout, scores=scores)], [rollout.loss_mask])(torch.arange(256))
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        exact = network(torch.from_numpy(ids[None].astype(np.int64))).logits[0, 63:-1].log_softmax(-1)
    error = (logits.log_softmax(-1) - exact).abs()
    assert 0 < error.mean() < 3e-3  # nats: what the docstring of teacher.head promises
    assert error.max() < 2e-2


@pytest.mark.parametrize("name", ["teacher", "tied"])
def test_a_head_is_found_wherever_the_folder_keeps_it(folders: Path, tmp_path: Path, name: str) -> None:
    network = AutoModelForCausalLM.from_pretrained(folders / name)
    network.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    able = met(folders / name)
    for folder in (folders / name, tmp_path / "shards"):
        head = find_head(folder, shape=(BYTES, able.hidden_size), digest=able.head_id)
        assert torch.equal(head, network.get_output_embeddings().weight)


def test_a_head_in_half_precision_is_that_of_a_server_in_full_precision(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "teacher", tmp_path / "half")
    network = AutoModelForCausalLM.from_pretrained(folders / "teacher", dtype=torch.bfloat16)
    network.save_pretrained(tmp_path / "half")
    able = met(tmp_path / "half")
    assert find_head(tmp_path / "half", shape=(BYTES, 96), digest=able.head_id).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("served", "head", "dtype", "says"),
    [
        ("student", "tied", "float32", "the head in .*tied' is not the one that the teacher's states are for"),
        ("teacher", "teacher", "bfloat16", "in the precision in which it is served"),
        ("teacher", "student", "float32", "holds no head of 259 tokens, which the student has, by 96"),
        ("padded", "padded", "float32", "holds no head of 259 tokens, which the student has, by 64"),
    ],
)
def test_the_head_of_another_model_is_refused(folders: Path, served: str, head: str, dtype: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        opened(folders, served, head=head, dtype=dtype)


def test_a_damaged_weights_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a readable safetensors file"):
        find_head(tmp_path, shape=(2, 2), digest="")


@pytest.mark.parametrize(
    ("method", "teacher"), [("opd", SERVER), ("opsd", {"kind": "self", "privileged_template": "{prompt} {answer}"})]
)
def test_a_run_that_reads_no_states_has_none(method: str, teacher: Mapping[str, Any]) -> None:
    assert SentStates.of(make_config(method=method, teacher=teacher), None, make_student()) is None


# ------------------------------------------------------------------------------------------------ what is asked of it


@pytest.mark.parametrize("name", FULL)
def test_a_method_that_reads_all_logits_asks_for_states_and_nothing_else(name: str) -> None:
    assert asked(PRESETS[name].objective, hidden_size=64) == Ask(hidden=64)
    assert support_k(PRESETS[name].objective) == 0


def test_a_method_that_reads_less_asks_for_no_states() -> None:
    assert asked(PRESETS["opd"].objective, hidden_size=64).hidden == 0
