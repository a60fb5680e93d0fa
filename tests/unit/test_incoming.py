"""What a worker makes of a version is the student that the learner has, by whichever encoding it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from learner.model import CausalModel, load_student
from learner.publish import Publisher, adapter, snapshot
from potstill.config import StudentConfig
from potstill.errors import WeightsError
from potstill.transports.disk import Disk
from potstill.transports.route import Route
from potstill.weights import pack
from rollout_worker.incoming import Incoming
from tests.tiny_models import save_tiny_model

LORA = {"rank": 3, "alpha": 5.0}


def route(**changes: Any) -> Route:
    return Route(**{"transport": "disk", "wire": "exact", "adapter_only": False, "reason": ""} | changes)


def student_of(folder: Path, **config: Any) -> CausalModel:
    """With an adapter, one that has learnt something."""
    student = load_student(StudentConfig(model=str(folder), **config), seed=0, device=torch.device("cpu"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return student


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_an_adapter_alone_becomes_the_student_that_was_merged_before_it_travelled(
    tie: bool, dtype: str, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path, seed=0, layers=2, tie_word_embeddings=tie)
    student = student_of(folder, dtype=dtype, lora=LORA)
    version, payload = snapshot(student, version=1, route=route(adapter_only=True))
    whole = snapshot(student, version=1)
    assert payload.size < whole[1].size / 5
    merged = Incoming(folder, dtype).tensors(version, payload)
    expected = Incoming(folder, dtype).tensors(*whole)
    base = Incoming(folder, dtype).base()
    assert merged.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(merged[name], weight), name
    moved = [name for name in merged if not torch.equal(merged[name], base[name].to(merged[name].dtype))]
    assert len(moved) == 7 * 2


def test_rounding_loses_at_most_one_part_in_256_of_each_weight_and_half_the_bytes(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, seed=0)
    student = student_of(folder)
    version, payload = snapshot(student, version=1, route=route(wire="bfloat16"))
    assert payload.size == pytest.approx(snapshot(student, version=1)[1].size / 2, rel=0.01)
    received = Incoming(folder, "float32").tensors(version, payload)
    worst = 0.0
    for name, weight in student.full_weights().items():
        error = (received[name].float() - weight.detach()).abs()
        assert (error <= weight.abs() / 256).all()
        worst = max(worst, float((error / weight.detach().abs().clamp(min=1e-30)).max()))
    assert worst > 1 / 600  # it is not exact


def test_what_is_published_can_be_opened_and_loaded(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "student", seed=0)
    student = student_of(folder)
    publisher = Publisher(route(wire="delta"), Disk(tmp_path / "weights"))
    version = publisher.publish(student, version=4)
    received = Incoming(folder, "float32").tensors(version, version.payload.open({}))
    for name, weight in student.full_weights().items():
        assert torch.equal(received[name], weight)
    publisher.close()


def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, seed=0)
    tensors, scale = adapter(student_of(folder, lora=LORA))
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    incoming = Incoming(folder, "float32")
    first = next(name for name in arrays if "lora_A" in name)
    other = first.replace("lora_A", "lora_B")
    for changed, message in (
        ({name: array for name, array in arrays.items() if name != other}, "does not fit"),
        (arrays | {first: arrays[first][:, :-1]}, "does not fit"),
        ({name: array for name, array in arrays.items() if name != first}, "does not have"),
        (arrays | {"model.norm.weight": arrays[first][0]}, r"does not have: model\.norm\.weight"),
    ):
        with pytest.raises(WeightsError, match=message):
            incoming.tensors(*pack(changed, 1, adapter_scale=scale))
