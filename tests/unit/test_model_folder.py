"""Model folders that mean ill: refused before anything in them is loaded, and no code of theirs is ever run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from transformers import AutoConfig

from learner.model import load_transformer
from potstill import shards
from potstill.errors import ConfigError
from potstill.model_folder import CODE, PICKLES, check_model_folder, why_unsafe
from potstill.tokenization import load_tokenizer
from rollout_worker.model_decoder import ModelDecoder
from tests import pickles
from tests.tiny_models import save_tiny_model

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
ROOMS = ("potstill", "orchestrator", "rollout_worker", "teacher_server", "learner")


def sound(folder: Path) -> Path:
    """A folder that nothing speaks against."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": np.zeros((2, 3), dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def put_canary(file: Path, canary: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickles.canary(canary))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_nothing_speaks_against_a_plain_folder(tmp_path: Path) -> None:
    folder = sound(tmp_path / "model")
    check_model_folder(folder)
    assert why_unsafe(folder, within=folder) is None


def test_the_canary_sings_where_it_is_unpickled(tmp_path: Path) -> None:
    put_canary(tmp_path / "a.pkl", tmp_path / "sang")
    pickle.loads((tmp_path / "a.pkl").read_bytes())  # noqa: S301
    assert (tmp_path / "sang").exists()


@pytest.mark.parametrize("suffix", sorted(CODE | PICKLES))
@pytest.mark.parametrize("place", ["x{}", "X{}", ".hidden/x{}", "deep/er/x{}"])
def test_code_and_pickles_are_refused_by_name_wherever_they_lie(tmp_path: Path, suffix: str, place: str) -> None:
    folder = sound(tmp_path / "model")
    put_canary(folder / place.format(suffix.upper() if "X" in place else suffix), tmp_path / "sang")
    problem = why_unsafe(folder, within=folder)
    assert problem is not None
    assert place.format("").split("/")[-1] in problem
    assert str(tmp_path) not in problem
    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize(
    ("file", "settings", "said"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "x.Config"}}, "auto_map"),
        ("config.json", {"auto_map": None}, "auto_map"),
        ("config.json", {"text_config": {"layers": [{"auto_map": {}}]}}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.T", None]}}, "auto_map"),
        ("generation_config.json", {"auto_map": {}}, "auto_map"),
        ("config.json", {"attn_implementation": "somebody/kernels"}, "kernels"),
        ("config.json", {"_attn_implementation": {"": "somebody/kernels:f"}}, "kernels"),
        ("config.json", {"vision": {"experts_implementation": "somebody/kernels"}}, "kernels"),
    ],
)
def test_configs_that_ask_for_code_are_refused_by_everybody(
    tmp_path: Path, file: str, settings: dict[str, Any], said: str
) -> None:
    folder = sound(tmp_path / "model")
    (folder / file).write_text(json.dumps(settings))
    assert said in str(why_unsafe(folder, within=folder))
    with pytest.raises(ConfigError, match=said):
        check_model_folder(folder)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "..\\x", ".", "", "absent.safetensors"])
def test_an_index_names_only_files_beside_it(tmp_path: Path, name: str) -> None:
    folder = sound(tmp_path / "model")
    sound(tmp_path / "other")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    assert "not beside it" in str(why_unsafe(folder, within=tmp_path))
    with pytest.raises(ConfigError, match="not beside it"):
        check_model_folder(folder)


def test_an_adapter_that_names_a_base_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = sound(tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/somewhere/else"}))
    assert "adapter_config.json" in str(why_unsafe(folder, within=folder))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b" " * (16 * 2**20 + 1)])
def test_a_config_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = sound(tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    assert "not readable JSON" in str(why_unsafe(folder, within=folder))


def link_out(folder: Path) -> None:
    (folder / "vocab.txt").symlink_to("/etc/passwd")


def link_to_a_folder(folder: Path) -> None:
    (folder / "more").symlink_to("/etc")


def dangle(folder: Path) -> None:
    (folder / "vocab.txt").symlink_to(folder / "absent")


def loop(folder: Path) -> None:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "config_x.json")


def nest(folder: Path) -> None:
    folder.joinpath(*"abcdefghijkl").mkdir(parents=True)


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [link_out, link_to_a_folder, dangle, loop, pipe, nest, lose_weights])
def test_a_folder_is_plain_files_of_its_own(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    folder = sound(tmp_path / "model")
    spoil(folder)
    problem = why_unsafe(folder, within=folder)
    assert problem is not None
    assert str(tmp_path) not in problem
    assert "passwd" not in problem


def test_links_may_lead_anywhere_inside_the_root(tmp_path: Path) -> None:
    """As a Hugging Face cache has them: a snapshot of links to blobs beside it."""
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    sound(blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(os.path.relpath(blob, snapshot))
    assert why_unsafe(snapshot, within=(tmp_path / "hub").resolve()) is None
    assert "leads out of it" in str(why_unsafe(snapshot, within=snapshot.resolve()))


def test_a_tokenizer_alone_needs_no_weights(tmp_path: Path) -> None:
    folder = sound(tmp_path / "model")
    lose_weights(folder)
    assert why_unsafe(folder, within=folder, weights=False) is None


# Headers of safetensors


def of_header(header: Any, data: bytes = bytes(24), *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, *, dtype: str = "F32", shape: Any = (2, 3)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HALF = {"shape": (3,)}
BAD_FILES = {
    "too short": b"\x01\x00",
    "huge length": of_header({}, b"", length=2**63),
    "length beyond the file": of_header({"w": entry(0, 24)}, length=2**20),
    "length of 2 to the 64 less 1": of_header({}, b"", length=2**64 - 1),
    "no JSON": of_header(b"not json"),
    "a list": of_header([]),
    "metadata that is no table": of_header({"__metadata__": 3}, b""),
    "deep JSON": of_header(b"[" * 200_000),
    "a number without end": of_header(b'{"w": ' + b"9" * 10_000 + b"}"),
    "a tensor twice": of_header(b'{"w": %s, "w": %s}' % ((json.dumps(entry(0, 24)).encode(),) * 2)),
    "overlapping tensors": of_header({"a": entry(0, 12, **HALF), "b": entry(8, 20, **HALF)}, bytes(20)),
    "the same bytes twice": of_header({"a": entry(0, 24), "b": entry(0, 24)}),
    "a hole": of_header({"a": entry(0, 12, **HALF), "b": entry(16, 28, **HALF)}, bytes(28)),
    "bytes of nobody at the end": of_header({"w": entry(0, 24)}, bytes(25)),
    "bytes of nobody at the start": of_header({"w": entry(8, 32)}, bytes(32)),
    "beyond the end": of_header({"w": entry(0, 24)}, bytes(23)),
    "far beyond the end": of_header({"w": entry(2**40, 2**40 + 24)}),
    "backwards": of_header({"w": entry(24, 0)}),
    "negative": of_header({"w": entry(-24, 0)}),
    "a shape that overflows": of_header({"w": entry(0, 24, shape=(2**32, 2**32, 2**32))}),
    "a negative shape": of_header({"w": entry(0, 24, shape=(-2, -3))}),
    "a shape of truth values": of_header({"w": entry(0, 4, shape=(True,))}, bytes(4)),
    "another size than its shape": of_header({"w": entry(0, 20)}, bytes(20)),
    "an unknown type": of_header({"w": entry(0, 24, dtype="PICKLE")}),
    "a type that is no text": of_header({"w": {**entry(0, 24), "dtype": ["F32"]}}),
    "an entry without a shape": of_header({"w": {"dtype": "F32", "data_offsets": [0, 24]}}),
    "an entry with more": of_header({"w": {**entry(0, 24), "code": "x"}}),
    "three offsets": of_header({"w": {**entry(0, 24), "data_offsets": [0, 12, 24]}}),
    "offsets that are no list": of_header({"w": {**entry(0, 24), "data_offsets": "0,24"}}),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_damaged_or_hostile_header_is_refused(tmp_path: Path, name: str) -> None:
    folder = sound(tmp_path / "model")
    (folder / "more.safetensors").write_bytes(BAD_FILES[name])
    problem = why_unsafe(folder, within=folder)
    assert problem is not None
    assert problem.startswith("more.safetensors ")


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as sparse:
        sparse.write(struct.pack("<Q", shards.MAX_HEADER_BYTES + 1))
        sparse.truncate(8 + shards.MAX_HEADER_BYTES + 1)
    assert "header of more than" in str(shards.problem_in(file))


def test_every_type_that_safetensors_writes_is_known(tmp_path: Path) -> None:
    kinds = (np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.float16, np.int32, np.uint32, np.float32)
    arrays = {str(index): np.zeros((3, 5), dtype=kind) for index, kind in enumerate((*kinds, np.int64, np.float64))}
    save_file({**arrays, "none": np.zeros((0, 4), dtype=np.float32)}, tmp_path / "x.safetensors", {"format": "pt"})
    assert shards.problem_in(tmp_path / "x.safetensors") is None


@given(st.binary(max_size=400) | st.binary(max_size=400).map(lambda data: of_header(data, b"")))
@settings(max_examples=200, deadline=None)
def test_whatever_is_no_safetensors_file_is_refused_with_a_reason(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        assert shards.problem_in(Path(file.name)) is not None or safetensors.numpy.load(content) == {}


# Nobody runs what lies in a folder


def test_no_loader_unpickles_weights(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", seed=0, layers=1)
    (folder / "model.safetensors").unlink()
    put_canary(folder / "pytorch_model.bin", tmp_path / "sang")
    with pytest.raises(ConfigError):
        load_transformer(str(folder), dtype=torch.float32, device=CPU)
    with pytest.raises(OSError, match="safetensors"):
        ModelDecoder(folder, AutoConfig.from_pretrained(folder), "float32")
    assert not (tmp_path / "sang").exists()


def test_no_loader_runs_code_of_a_folder(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", seed=0, layers=1)
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'sang')!r})")
    for file in ("config.json", "tokenizer_config.json"):
        edit(folder / file, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]})
    for load in (
        lambda: load_tokenizer(folder),
        lambda: load_transformer(str(folder), dtype=torch.float32, device=CPU),
        lambda: check_model_folder(folder),
    ):
        with pytest.raises(ConfigError, match="auto_map"):
            load()
    assert not (tmp_path / "sang").exists()


# What the source may say

UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
MAY_PICKLE = {"bench/scale/one_process.py", "bench/gpu/weights_device.py"}  # their own objects, of a moment ago


def sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()


def test_nothing_of_ours_can_unpickle() -> None:
    found = set()
    for name, tree in sources(*ROOMS, "bench", "deploy"):
        for node in ast.walk(tree):
            if imported(node) & UNPICKLERS:
                found.add(name)
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "load":
                continue
            owner = ast.unparse(node.func.value)
            allowed = [ast.unparse(word.value) for word in node.keywords if word.arg == "allow_pickle"]
            if owner == "torch" or (owner in {"np", "numpy"} and allowed != ["False"]):
                found.add(name)
    assert found <= MAY_PICKLE


def test_remote_code_is_never_trusted_and_no_setting_can_change_that() -> None:
    for name, tree in sources(*ROOMS):
        for node in ast.walk(tree):
            words = node.keywords if isinstance(node, ast.Call) else []
            trusted = [ast.unparse(word.value) for word in words if word.arg == "trust_remote_code"]
            assert trusted in ([], ["False"]), name
            loads = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if loads and node.func.attr == "from_pretrained":
                assert trusted == ["False"], f"{name}:{node.lineno}"
            assert not (isinstance(node, ast.AnnAssign) and "trust_remote_code" in ast.unparse(node.target)), name
