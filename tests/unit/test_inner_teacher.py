"""Models beside the student: aligned on the completion, moving only as they are told to, and routed by domain."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.divergences import reverse_kl
from learner.inner_teacher import Copy, InnerModels, InnerTeacher, Member, MovingAverage
from learner.model import CausalModel, load_student
from learner.packing import Packed, pack
from potstill.errors import ConfigError
from potstill.types import Rollout
from tests.rollouts import random_batch
from tests.tiny_models import save_tiny_model
from tests.trainers import (
    PLAIN,
    SELF_TEACHER,
    VOCABULARY,
    make_config,
    make_network,
    make_student,
    plain_logits,
    same,
    weights_of,
)

LENGTHS = [(3, 4), (1, 6), (5, 2)]
MASKS = [np.array([1, 1, 0, 1], bool), np.array([1, 1, 1, 1, 0, 1], bool), np.array([0, 1], bool)]
NUM_TOKENS = sum(int(mask.sum()) for mask in MASKS)
ANYWHERE = [""] * len(LENGTHS)
ANCHOR = {"auxiliaries": {"anchor": {"against": "reference", "support": "full", "loss": "reverse_kl"}}}
EVERY_KIND = pytest.mark.parametrize("weights", ["frozen", "ema", "live", "trust_region"])


def some_rollouts() -> list[Rollout]:
    """Whose teacher's context is two tokens longer than the prompt."""
    return [scored.rollout for scored in random_batch(LENGTHS, vocabulary=VOCABULARY, seed=1, masks=MASKS)]


def pack_view(*, privileged: bool = True) -> Packed:
    """The rollouts under the teacher's own prompt, or under the student's."""
    rollouts = some_rollouts()
    contexts = [r.teacher_context_ids if privileged else r.prompt_ids for r in rollouts]
    return pack(contexts, [r.completion_ids for r in rollouts], [r.loss_mask for r in rollouts])  # type: ignore[arg-type]


def beside(
    student: CausalModel, weights: str, *, objective: dict[str, Any] | None = None, **teacher: Any
) -> InnerModels:
    """The models of a run of opsd."""
    config = make_config(method="opsd", objective=objective, teacher={**SELF_TEACHER, "weights": weights, **teacher})
    return InnerModels.beside(student, config)


def logits_of(teacher: InnerTeacher | None, *, privileged: bool = True) -> Tensor:
    """[M, V] of every loss token."""
    assert teacher is not None
    return teacher.logits(pack_view(privileged=privileged), domains=ANYWHERE)(torch.arange(NUM_TOKENS))


def students_logits(student: CausalModel, *, privileged: bool = True) -> Tensor:
    return student(pack_view(privileged=privileged)) @ student.head.T


@torch.no_grad()
def step(student: CausalModel, *, seed: int, size: float = 0.05) -> None:
    """Move what is trained somewhere else, in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def gradient_towards(teacher: InnerTeacher | None, student: CausalModel, *, privileged: bool) -> Tensor:
    """Of the reverse KL to the teacher, by every weight of the student."""
    own, other = students_logits(student, privileged=False), logits_of(teacher, privileged=privileged)
    student.zero_grad()
    reverse_kl(own.log_softmax(-1), other.log_softmax(-1)).sum().backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@EVERY_KIND
def test_the_teacher_reads_its_own_context_and_is_aligned_on_the_completion(weights: str) -> None:
    plain = make_network(attention=PLAIN)
    expected = [
        plain_logits(plain, r.teacher_context_ids, r.completion_ids)[torch.from_numpy(r.loss_mask)]  # type: ignore[arg-type]
        for r in some_rollouts()
    ]
    found = logits_of(beside(make_student(), weights).teacher)
    torch.testing.assert_close(
        found.log_softmax(-1), torch.cat(expected).detach().log_softmax(-1), rtol=1e-9, atol=1e-10
    )


@EVERY_KIND
def test_rows_may_be_asked_for_in_any_order(weights: str) -> None:
    teacher = beside(make_student(), weights).teacher
    assert teacher is not None
    logits = teacher.logits(pack_view(), domains=ANYWHERE)
    rows = torch.tensor([4, 0, 4, 7])
    torch.testing.assert_close(logits(rows), logits(torch.arange(NUM_TOKENS))[rows], rtol=0, atol=1e-14)


@EVERY_KIND
def test_the_gradient_is_zero_under_the_students_own_context_and_not_under_another(weights: str) -> None:
    student = make_student()
    teacher = beside(student, weights).teacher
    assert gradient_towards(teacher, student, privileged=False).abs().max() < 1e-13
    assert gradient_towards(teacher, student, privileged=True).abs().max() > 1e-3


@EVERY_KIND
def test_the_teacher_has_no_gradient_and_leaves_the_students_alone(weights: str) -> None:
    student = make_student()
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    models = beside(student, weights)
    assert not logits_of(models.teacher).requires_grad
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trained
    assert all(p.grad is None for p in student.parameters())
    assert not any(tensor.requires_grad for tensor in models.state().values())


def test_no_gradient_reaches_the_student_through_a_live_teacher() -> None:
    """Its logits are held as constants: the gradient is that towards a frozen teacher of the same weights."""
    live, frozen = (
        gradient_towards(beside(student, weights).teacher, student, privileged=True)
        for weights, student in (("live", make_student()), ("frozen", make_student()))
    )
    assert torch.equal(live, frozen)


def test_a_pass_of_a_copy_leaves_the_students_weights_in_place() -> None:
    student = make_student(tie=True)
    addresses = [p.data_ptr() for p in student.parameters()]
    models = beside(student, "frozen")
    step(student, seed=1)
    moved = weights_of(student)
    logits_of(models.teacher)
    assert same(weights_of(student), moved)
    assert [p.data_ptr() for p in student.parameters()] == addresses


@pytest.mark.parametrize("tie", [False, True])
def test_a_frozen_teacher_and_the_reference_do_not_move(tie: bool) -> None:
    student = make_student(tie=tie)
    models = beside(student, "frozen", objective=ANCHOR)
    expected = students_logits(student).detach()
    for seed in (1, 2, 3):
        step(student, seed=seed)
        models.follow()
    assert torch.equal(logits_of(models.teacher), expected)
    assert torch.equal(logits_of(models.reference), expected)
    assert not torch.equal(students_logits(student), expected)


def test_a_live_teacher_is_the_student_after_every_step() -> None:
    student = make_student()
    teacher = beside(student, "live").teacher
    step(student, seed=1)
    assert torch.equal(logits_of(teacher), students_logits(student))


@pytest.mark.parametrize("trust", [0.01, 0.3])
def test_a_trust_region_is_the_normalised_geometric_mean_of_the_frozen_and_the_live_one(trust: float) -> None:
    student = make_student()
    teacher = beside(student, "trust_region", trust=trust).teacher
    frozen = students_logits(student).detach().softmax(-1)
    step(student, seed=1)
    live = students_logits(student).detach().softmax(-1)
    product = frozen ** (1 - trust) * live**trust
    found = logits_of(teacher).softmax(-1)
    torch.testing.assert_close(found, product / product.sum(-1, keepdim=True), rtol=1e-9, atol=1e-12)
    assert (found - frozen).abs().max() > 1e-4


@pytest.mark.parametrize("tie", [False, True])
def test_an_ema_teacher_is_the_average_of_the_students_with_geometric_weights(tie: bool) -> None:
    decay, student = 0.7, make_student(tie=tie)
    models = beside(student, "ema", ema_decay=decay)
    start, students = weights_of(student), []
    for seed in (1, 2, 3, 4):
        step(student, seed=seed)
        models.follow()
        students.append(weights_of(student))
    n = len(students)
    expected = {
        name: decay**n * weight + sum((1 - decay) * decay ** (n - 1 - i) * students[i][name] for i in range(n))
        for name, weight in start.items()
    }
    assert models.state().keys() == expected.keys()
    for name, weight in models.state().items():
        torch.testing.assert_close(weight, expected[name])
    averaged = make_student(tie=tie)
    averaged.load_state_dict(expected, strict=not tie)
    torch.testing.assert_close(logits_of(models.teacher), students_logits(averaged).detach())


def test_an_ema_of_a_bfloat16_student_does_not_lose_its_small_steps() -> None:
    """From 1 towards 1 + 2⁻⁷, the next bfloat16, by 1 % a step: in bfloat16 every step would round to none."""
    student = make_student().to(torch.bfloat16)
    with torch.no_grad():
        student.head.fill_(1.0)
    models = beside(student, "ema", ema_decay=0.99)
    in_bfloat16 = student.head.detach().clone()
    with torch.no_grad():
        student.head.fill_(1 + 2**-7)
    for _ in range(50):
        models.follow()
        in_bfloat16.lerp_(student.head.detach(), 0.01)
    average = models.state()["network.lm_head.weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full_like(average, 1 + 2**-7 * (1 - 0.99**50)), rtol=0, atol=1e-6)
    assert bool((in_bfloat16 == 1.0).all())


def test_a_teacher_computes_in_the_students_dtype_and_answers_in_float32() -> None:
    student = make_student().to(torch.bfloat16)
    found = logits_of(beside(student, "ema").teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, students_logits(student).detach().float())


@pytest.mark.parametrize(("weights", "kept"), [("frozen", 0), ("ema", 1), ("live", 0), ("trust_region", 0)])
def test_a_checkpoint_keeps_only_what_no_folder_holds(weights: str, kept: int) -> None:
    student = make_student(tie=True)
    state = beside(student, weights).state()
    assert len(state) == kept * len(weights_of(student))
    assert {p.data_ptr() for p in state.values()}.isdisjoint(p.data_ptr() for p in student.parameters())


def test_a_loaded_state_is_the_teacher_it_came_from() -> None:
    student = make_student()
    one = beside(student, "ema", ema_decay=0.5)
    step(student, seed=1)
    one.follow()
    other = beside(make_student(seed=5), "ema", ema_decay=0.5)
    other.load(one.state())
    assert same(one.state(), other.state())
    assert torch.equal(logits_of(one.teacher), logits_of(other.teacher))


@pytest.mark.parametrize(("writer", "reader"), [("ema", "live"), ("frozen", "ema")])
def test_the_state_of_another_kind_of_teacher_is_refused(writer: str, reader: str) -> None:
    with pytest.raises(ConfigError, match="the checkpoint's teacher is not this run's"):
        beside(make_student(), reader).load(beside(make_student(), writer).state())


def num_copies(student: CausalModel) -> int:
    """Copies of the student's weights that are alive."""
    alive = [thing for thing in gc.get_objects() if type(thing) in (Copy, MovingAverage)]
    return sum(copy._student is student for copy in alive)


@pytest.mark.parametrize(
    ("weights", "objective", "copies"),
    [(weights, {}, copies) for weights, copies in {"live": 0, "frozen": 1, "ema": 1, "trust_region": 1}.items()]
    + [(weights, ANCHOR, copies) for weights, copies in {"live": 1, "frozen": 1, "ema": 2, "trust_region": 1}.items()],
)
def test_weights_are_copied_no_more_often_than_they_differ(
    weights: str, objective: dict[str, Any], copies: int
) -> None:
    student = make_student()
    models = beside(student, weights, objective=objective)
    assert num_copies(student) == copies
    assert (models.reference is None) == (not objective)


def test_an_objective_that_reads_no_teacher_has_none() -> None:
    models = InnerModels.beside(make_student(), make_config(method="sft", teacher={"kind": "none"}))
    models.follow()
    assert (models.teacher, models.reference, models.state()) == (None, None, {})


def adapted_student(folder: Path) -> CausalModel:
    config = make_config(student={"model": str(folder), "lora": {"rank": 4, "alpha": 8.0}})
    return load_student(config.student, seed=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    parent = tmp_path_factory.mktemp("models")
    made = [save_tiny_model(parent / f"model-{seed}", seed=seed, layers=1) for seed in range(3)]
    return [*made, save_tiny_model(parent / "wide", seed=3, layers=1, vocab_size=264)]


def test_the_frozen_teacher_of_an_adapter_is_the_base_model_and_costs_no_copy(folders: list[Path]) -> None:
    base = load_student(make_config(student={"model": str(folders[0])}).student, seed=0, device=torch.device("cpu"))
    student = adapted_student(folders[0])
    models = beside(student, "frozen", objective=ANCHOR)
    step(student, seed=1, size=0.3)
    expected = students_logits(base).detach()
    assert torch.equal(logits_of(models.teacher), expected)
    assert torch.equal(logits_of(models.reference), expected)
    assert (students_logits(student) - expected).abs().max() > 1e-2
    assert all(p.requires_grad == (".lora_" in name) for name, p in student.network.named_parameters())
    assert num_copies(student) == 0


def test_the_ema_teacher_of_an_adapter_holds_the_adapter_alone(folders: list[Path]) -> None:
    student = adapted_student(folders[0])
    models = beside(student, "ema", ema_decay=0.5)
    start = {name: weight.clone() for name, weight in models.state().items()}
    step(student, seed=1, size=0.3)
    models.follow()
    trained = {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}
    assert start.keys() == trained.keys()
    for name, weight in models.state().items():
        torch.testing.assert_close(weight, (start[name] + trained[name]) / 2)
    halfway = adapted_student(folders[0])
    halfway.load_state_dict(models.state(), strict=False)
    torch.testing.assert_close(logits_of(models.teacher), students_logits(halfway).detach())


def local_teacher(folders: Sequence[Path], *, student: Path, **teacher: Any) -> InnerTeacher:
    models = [{"model": str(folder), "weight": weight} for folder, weight in zip(folders, (1.0, 3.0), strict=False)]
    config = make_config(
        method="opsd", student={"model": str(student)}, teacher={"kind": "local", "models": models, **teacher}
    )
    own = load_student(config.student, seed=0, device=torch.device("cpu"))
    found = InnerModels.beside(own, config)
    assert found.state() == {}
    assert found.teacher is not None
    return found.teacher


def loaded_logits(folder: Path) -> Tensor:
    student = load_student(make_config(student={"model": str(folder)}).student, seed=0, device=torch.device("cpu"))
    return students_logits(student).detach()


def test_a_model_from_a_folder_teaches_as_it_is(folders: list[Path]) -> None:
    found = logits_of(local_teacher(folders[1:2], student=folders[0]))
    assert torch.equal(found, loaded_logits(folders[1]))
    assert not found.requires_grad


def test_two_models_are_averaged_with_their_weights_as_the_config_says(folders: list[Path]) -> None:
    one, two = (loaded_logits(folder).softmax(-1) for folder in folders[1:3])
    geometric = one**0.25 * two**0.75
    averages = {"logits": geometric / geometric.sum(-1, keepdim=True), "probabilities": 0.25 * one + 0.75 * two}
    for combine, expected in averages.items():
        found = logits_of(local_teacher(folders[1:3], student=folders[0], combine=combine))
        torch.testing.assert_close(found.softmax(-1), expected, rtol=1e-4, atol=1e-7)


def test_a_model_of_another_vocabulary_is_refused_with_both_sizes_and_names(folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"wide' has a vocabulary of 264, the student '.*model-0' of 259"):
        local_teacher(folders[3:], student=folders[0])


def member_of(student: CausalModel, seen: list[tuple[int, ...]], **options: Any) -> Member:
    """A member that notes the lengths of what it runs over."""

    def see(packed: Packed) -> tuple[Tensor, Tensor]:
        seen.append(packed.lengths)
        return student(packed), student.head

    return Member(see=see, **options)


def test_each_member_runs_over_its_own_domains_and_general_ones_over_all() -> None:
    general, maths, code = (make_student(seed=seed) for seed in (1, 2, 3))
    seen: list[list[tuple[int, ...]]] = [[], [], [], []]
    teacher = InnerTeacher(
        [
            member_of(general, seen[0], weight=1.0),
            member_of(maths, seen[1], weight=3.0, domains=("sums", "proofs")),
            member_of(code, seen[2], weight=1.0, domains=("code",)),
            member_of(code, seen[3], weight=1.0, domains=("law",)),
        ]
    )
    packed = pack_view(privileged=False)  # one of its prompts is a single token
    found = teacher.logits(packed, domains=["sums", "chat", "code"])(torch.arange(NUM_TOKENS))
    assert seen == [[packed.lengths], [packed.lengths[:1]], [packed.lengths[2:]], []]
    sizes = [int(mask.sum()) for mask in MASKS]
    by_model = [students_logits(student, privileged=False).detach().split(sizes) for student in (general, maths, code)]
    (g1, g2, g3), (m1, _, _), (_, _, c3) = by_model
    expected = torch.cat([0.25 * g1 + 0.75 * m1, g2, 0.5 * g3 + 0.5 * c3])
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), rtol=1e-9, atol=1e-12)


def test_a_domain_that_nobody_scores_is_an_error_that_names_it() -> None:
    teacher = InnerTeacher([member_of(make_student(), [], domains=("code",))])
    with pytest.raises(ConfigError, match="none scores domain 'chat'"):
        teacher.logits(pack_view(), domains=["code", "chat", "code"])


def test_every_sequence_has_a_domain() -> None:
    teacher = InnerTeacher([member_of(make_student(), [])])
    with pytest.raises(ValueError, match="3 sequences, but 2 domains"):
        teacher.logits(pack_view(), domains=["", ""])
