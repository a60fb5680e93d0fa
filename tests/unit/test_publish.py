"""What is published is the student as it was at that version, whole, and in the form that workers ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from learner.model import CausalModel, load_student
from learner.publish import as_numpy, snapshot
from learner.trainer import Trainer
from potstill.config import StudentConfig
from potstill.weights import check_fits, shapes_in, unpack
from tests.rollouts import random_batch
from tests.tiny_models import save_tiny_model
from tests.trainers import VOCABULARY, make_config, take_step

LORA = {"rank": 2, "alpha": 4.0}


def student_of(folder: Path, **config: Any) -> CausalModel:
    return load_student(StudentConfig(model=str(folder), **config), seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapter"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_version_holds_the_tensors_of_the_students_folder(tie: bool, lora: Any, dtype: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, seed=0, hidden=32, layers=1, tie_word_embeddings=tie)
    version, _ = snapshot(student_of(folder, lora=lora, dtype=dtype), version=3)
    check_fits(version, shapes_in(folder), dtype)
    assert version.version == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unpacked_weights_are_the_students_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    student = student_of(save_tiny_model(tmp_path, seed=0, hidden=32, layers=1), dtype=dtype)
    arrays = unpack(*snapshot(student, version=1))
    for name, weight in student.full_weights().items():
        assert (arrays[name] == as_numpy(weight)).all()
        assert arrays[name].dtype == ("uint16" if dtype == "bfloat16" else "float32")


def test_a_later_step_does_not_reach_into_a_published_version(tmp_path: Path) -> None:
    student = student_of(save_tiny_model(tmp_path, seed=0, hidden=32, layers=1))
    version, payload = snapshot(student, version=0)
    before = payload.copy()
    trainer = Trainer(make_config(objective={"support": {"k": 3}}), student)
    take_step(trainer, random_batch([(3, 4)], vocabulary=VOCABULARY, seed=1), 1)
    assert (payload == before).all()
    unpack(version, payload)
    assert (snapshot(student, version=1)[1] != before).any()
