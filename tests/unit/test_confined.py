"""No name and no link leads out of the folder of all runs: what is opened is what was named, or nothing is."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.service import confined
from orchestrator.service.manifests import checkpoint_of, open_of
from potstill.errors import ServiceError
from tests.opened import recorded
from tests.run_folders import FILES, HOSTILE, make_checkpoint

SECRET = b"what lies outside"
NAMES = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(alphabet="./\\\0%2e:~#ab", max_size=30),
    st.lists(st.sampled_from(["..", ".", "model", "config.json", "checkpoints", "outside", ""]), max_size=8).map(
        "/".join
    ),
    st.text(max_size=20),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, with a file beside it that nobody may read, and links to it in every place."""
    place = tmp_path_factory.mktemp("house")
    runs = place / "runs"
    (place / "outside").write_bytes(SECRET)
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "outside").write_bytes(SECRET)
    make_checkpoint(runs / "one", 1)
    make_checkpoint(place / "elsewhere", 1)
    links = make_checkpoint(runs / "links", 1)
    (links / "model" / "config.json").unlink()
    (links / "model" / "config.json").symlink_to(place / "outside")
    (runs / "links" / "out").symlink_to(place / "elsewhere")
    (runs / "links" / "checkpoints" / "step-000002").symlink_to(place / "elsewhere" / "checkpoints" / "step-000001")
    (runs / "linked").symlink_to(place / "elsewhere")
    os.mkfifo(runs / "links" / "pipe")
    return runs


def check_contained(opened: list[tuple[str, int]], runs: Path) -> None:
    """The root by its path; everything else by one name relative to what was opened before it, and never by a link."""
    for name, flags in opened:
        if name != str(runs):
            assert "/" not in name
            assert name not in {"", ".", ".."}
            assert flags & os.O_NOFOLLOW


def read_of(runs: Path, run: str, checkpoint: str, path: str) -> bytes | None:
    try:
        with open_of(runs, checkpoint_of(runs, run, checkpoint), path) as file:
            return file.read()
    except ServiceError as error:
        if error.status not in {404, 500}:
            raise
        return None


@settings(deadline=None, max_examples=400)
@given(st.lists(NAMES, min_size=1, max_size=4))
def test_whatever_the_parts_are_nothing_outside_is_opened(runs: Path, parts: list[str]):
    with recorded() as opened:
        try:
            with confined.open_file(runs, *parts) as file:
                assert file.read() != SECRET
        except FileNotFoundError:
            pass
    check_contained(opened, runs)


@settings(deadline=None, max_examples=400)
@given(NAMES, NAMES)
def test_whatever_checkpoint_and_file_are_called_nothing_outside_is_opened(runs: Path, name: str, path: str):
    with recorded() as opened:
        for run in ("one", "links"):
            for checkpoint in (name, "step-000001", "step-000002"):
                assert read_of(runs, run, checkpoint, path) in {None, FILES.get(path)}
    check_contained(opened, runs)


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda name: ascii(name)[:30])
def test_a_hostile_name_is_absent_in_every_place(hostile: str, runs: Path):
    places = [(hostile,), ("one", hostile), ("one", "checkpoints", hostile, "manifest.json"), (hostile, "checkpoints")]
    for parts in places:
        with pytest.raises(FileNotFoundError):
            confined.open_file(runs, *parts)
        assert confined.names(runs, *parts) == []
        with pytest.raises(FileNotFoundError), confined.taken_away(runs, *parts):
            raise AssertionError("nothing is there")
    with pytest.raises(ServiceError) as caught:
        open_of(runs, checkpoint_of(runs, "one", "step-000001"), hostile)
    assert (caught.value.status, caught.value.code) == (404, "checkpoint_file_not_found")


@pytest.mark.parametrize(
    "parts",
    [
        ("linked", "outside"),
        ("links", "out", "outside"),
        ("links", "checkpoints", "step-000001", "model", "config.json"),
        ("links", "checkpoints", "step-000002", "manifest.json"),
    ],
)
def test_a_link_is_not_followed_wherever_it_stands(parts: tuple[str, ...], runs: Path):
    assert runs.joinpath(*parts).exists()
    with pytest.raises(FileNotFoundError):
        confined.open_file(runs, *parts)


def test_a_folder_and_a_pipe_are_no_files_and_hold_nobody_up(runs: Path):
    for parts in (("one", "checkpoints"), ("links", "pipe")):
        with pytest.raises(FileNotFoundError):
            confined.open_file(runs, *parts)
    with pytest.raises(FileNotFoundError), confined.folder(runs, "links", "pipe"):
        raise AssertionError("that is no folder")


def test_no_descriptor_is_left_open(runs: Path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        for parts in (("one", "x"), ("linked", "outside"), ("links", "pipe"), ("one", "..", "x"), ("one",)):
            with pytest.raises(FileNotFoundError):
                confined.open_file(runs, *parts)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_taken_away_is_gone_at_once_and_a_link_is_removed_as_a_link(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    runs = tmp_path / "runs"
    make_checkpoint(runs / "one", 1)
    (runs / "one" / "inside").symlink_to(outside)
    (runs / "two").symlink_to(outside)
    (runs / "file").write_text("x")
    for name in ("one", "two", "file"):
        with confined.taken_away(runs, name):
            assert name not in os.listdir(runs)
    assert os.listdir(runs) == []
    assert (outside / "kept").read_text() == "kept"


def test_what_was_to_be_taken_away_is_back_when_the_block_fails(tmp_path: Path):
    make_checkpoint(tmp_path / "one", 1)
    with pytest.raises(ServiceError), confined.taken_away(tmp_path, "one", "checkpoints", "step-000001"):
        raise ServiceError("the database is away", 503, "database_unavailable")
    assert checkpoint_of(tmp_path, "one", "step-000001").files


def test_a_folder_that_becomes_a_link_while_it_is_read_never_leads_outside(tmp_path: Path):
    """Somebody swaps a folder for a link as fast as he can; a reader finds his own file, or none."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(SECRET)
    runs = tmp_path / "runs"
    (runs / "real").mkdir(parents=True)
    (runs / "real" / "file").write_bytes(b"mine")
    (runs / "link").symlink_to(tmp_path / "elsewhere")
    ended = threading.Event()

    def swap() -> None:
        while not ended.is_set():
            for name in ("real", "link"):
                os.rename(runs / name, runs / "place")
                os.rename(runs / "place", runs / name)

    thread = threading.Thread(target=swap)
    thread.start()
    found = set()
    try:
        for _ in range(3000):
            try:
                with confined.open_file(runs, "place", "file") as file:
                    found.add(file.read())
            except FileNotFoundError:
                found.add(b"")
    finally:
        ended.set()
        thread.join()
    assert SECRET not in found
    assert b"mine" in found
