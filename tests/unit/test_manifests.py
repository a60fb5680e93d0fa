"""What is listed of a run's checkpoints is complete, and what is not as its manifest says is handed to nobody."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.service.manifests import checkpoint_of, checkpoints_of, open_of
from orchestrator.service.store.checkpoints import Keeping
from potstill.errors import ServiceError
from tests.run_folders import FILES, make_checkpoint


def status_of(runs: Path, name: str = "step-000001") -> str:
    return str(checkpoint_of(runs, "one", name).resource(Keeping())["status"])


def rewrite(folder: Path, **manifest: Any) -> None:
    kept = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(kept | manifest))


def test_a_checkpoint_is_shown_with_every_file_its_size_and_its_digest(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "one", 12)
    shown = checkpoint_of(tmp_path, "one", "step-000012").resource(Keeping(published_as="mine", expires_at=0.0))
    manifest = (folder / "manifest.json").read_bytes()
    contents = {**FILES, "manifest.json": manifest}
    assert shown["files"] == [
        {"name": name, "bytes": len(contents[name]), "sha256": hashlib.sha256(contents[name]).hexdigest()}
        for name in sorted(contents)
    ]
    assert shown["bytes"] == sum(map(len, contents.values()))
    assert (shown["id"], shown["step"], shown["kind"], shown["status"]) == ("step-000012", 12, "full", "ready")
    assert (shown["published_as"], shown["expires_at"]) == ("mine", "1970-01-01T00:00:00.000Z")
    assert shown["created_at"].endswith("Z")


def test_one_that_lora_trained_says_so(tmp_path: Path):
    make_checkpoint(tmp_path / "one", 1, {**FILES, "adapter/adapter_model.safetensors": b"x"})
    assert checkpoint_of(tmp_path, "one", "step-000001").kind == "adapter"


def test_they_are_listed_by_number_and_what_is_not_complete_or_is_set_aside_is_not(tmp_path: Path):
    for step in (1_000_000, 999_999, 2):
        make_checkpoint(tmp_path / "one", step)
    for other in ("best", ".step-000003.3f2a11bc", "step-000004.damaged", "step-"):
        shutil.copytree(tmp_path / "one" / "checkpoints" / "step-000002", tmp_path / "one" / "checkpoints" / other)
    (tmp_path / "one" / "checkpoints" / "step-000005").mkdir()
    found = [checkpoint.name for checkpoint in checkpoints_of(tmp_path, "one")]
    assert found == ["step-000002", "step-999999", "step-1000000"]
    assert checkpoints_of(tmp_path, "nobody") == []
    for name in ("step-000005", "step-000003", "step-", "best", "step-٣", "step-1" + "0" * 40):
        with pytest.raises(ServiceError, match="no such checkpoint") as caught:
            checkpoint_of(tmp_path, "one", name)
        assert caught.value.status == 404


@pytest.mark.parametrize("file", [*FILES])
@pytest.mark.parametrize("how", ["cut short", "longer", "gone", "a link", "a folder"])
def test_a_file_that_is_not_as_the_manifest_says_makes_the_checkpoint_damaged(file: str, how: str, tmp_path: Path):
    path = make_checkpoint(tmp_path / "one", 1) / file
    content = path.read_bytes()
    path.unlink()
    if how == "cut short":
        path.write_bytes(content[:-1])
    elif how == "longer":
        path.write_bytes(content + b"x")
    elif how == "a link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif how == "a folder":
        path.mkdir()
    assert status_of(tmp_path) == "damaged"
    damaged = checkpoint_of(tmp_path, "one", "step-000001")
    assert {file["name"] for file in damaged.resource(Keeping())["files"]} == {*FILES, "manifest.json"}
    for name in FILES:
        with pytest.raises(ServiceError, match="damaged") as caught:
            open_of(tmp_path, damaged, name)
        assert (caught.value.status, caught.value.code) == (500, "checkpoint_damaged")


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "model/../../outside", "", "model//x", ".", "model/\0", "model\\x", "model/x/"],
)
def test_a_manifest_that_names_what_is_elsewhere_is_damaged(name: str, tmp_path: Path):
    folder = make_checkpoint(tmp_path / "one", 1)
    (folder.parent / "outside").write_bytes(b"")
    rewrite(folder, files={name: {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}})
    assert status_of(tmp_path) == "damaged"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"step": 1}',
        b'{"step": 1, "files": []}',
        b'{"step": 1, "files": {}}',
        b'{"step": 1, "files": {"model/config.json": {"sha256": "x", "bytes": 23}}}',
        b'{"step": 1, "files": {"model/config.json": {"sha256": "' + b"a" * 64 + b'", "bytes": -1}}}',
        b'{"step": 1, "files": {"model/config.json": {"sha256": "' + b"a" * 64 + b'", "bytes": 23, "more": 1}}}',
        b'{"step": 1, "files": ' + b"[" * 5000,
        b"\xff\xfe",
        b" " * ((16 << 20) + 1),
    ],
    ids=lambda content: repr(content[:40]),
)
def test_what_is_no_manifest_makes_the_checkpoint_damaged(content: bytes, tmp_path: Path):
    (make_checkpoint(tmp_path / "one", 1) / "manifest.json").write_bytes(content)
    assert status_of(tmp_path) == "damaged"


def test_a_file_that_is_removed_while_it_is_asked_for_is_refused(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "one", 1)
    found = checkpoint_of(tmp_path, "one", "step-000001")
    shutil.rmtree(folder)
    with pytest.raises(ServiceError, match="damaged"):
        open_of(tmp_path, found, "model/config.json")
