"""What is removed, what stays for whom, and what a service that is killed in between finds when it is back."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.service.artifacts import DOOMED, delete_checkpoint, delete_run, keep_used
from orchestrator.service.manifests import checkpoints_of
from orchestrator.service.principals import Limits, Principal, Scope
from orchestrator.service.publishing import PUBLISHED, publish, withdraw
from orchestrator.service.retention import expire
from orchestrator.service.runs import State
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.idempotency import Once
from orchestrator.service.store.runs import NewRun
from potstill.errors import ServiceError
from potstill.journal import KEPT
from tests.run_folders import FILES, make_checkpoint

ALICE = Principal(key_id="a", owner="alice", scopes=frozenset({Scope.RUNS_WRITE}), limits=Limits())
BOB = Principal(key_id="b", owner="bob", scopes=frozenset({Scope.RUNS_WRITE}), limits=Limits())


class Killed(BaseException):
    """What ends a service in the middle of a line."""


class House:
    """A store, and a folder of runs."""

    def __init__(self, folder: Path) -> None:
        self.runs = folder / "runs"
        self.runs.mkdir()
        self.store = Store(Database(f"sqlite:///{folder / 'potstill.db'}"))

    def add(
        self, name: str = "one", *, state: State = State.SUCCEEDED, steps: tuple[int, ...] = (), **config: Any
    ) -> None:
        new = NewRun(id=name, submitted={}, config={"name": name} | config, owner="alice")
        self.store.runs.create(new, Once(key_id="a", key=None, route="/v1/runs", body_digest="b"))
        if state is not State.QUEUED:
            self.store.runs.move(name, state, "as the test wants it")
        (self.runs / name).mkdir()
        for step in steps:
            make_checkpoint(self.runs / name, step)

    def steps(self, name: str = "one") -> list[int]:
        return [checkpoint.step for checkpoint in checkpoints_of(self.runs, name)]

    def remove(self, step: int, name: str = "one") -> None:
        delete_checkpoint(self.store, self.runs, self.store.runs.get(name), f"step-{step:06d}")

    def publish(self, step: int, as_name: str, name: str = "one") -> bool:
        return publish(self.store, self.runs, self.store.runs.get(name), f"step-{step:06d}", as_name)

    def withdraw(self, step: int, name: str = "one") -> str:
        return withdraw(self.store, self.runs, self.store.runs.get(name), f"step-{step:06d}")

    def forget(self, name: str = "one", *, who: Principal = ALICE, with_folder: bool = True) -> None:
        delete_run(self.store, self.runs, name, who, with_folder=with_folder)

    def limit(self, step: int, seconds: float) -> None:
        self.store.checkpoints.note("one", f"step-{step:06d}", expires_at=time.time() + seconds)

    def told(self) -> list[str]:
        return [event.type for event in self.store.events.list("one", after=0, limit=100)]

    def model(self, step: int, name: str = "one") -> str:
        return os.path.realpath(self.runs / name / "checkpoints" / f"step-{step:06d}" / "model")


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.store.close()


# One checkpoint


def test_a_checkpoint_that_nobody_needs_is_removed(house: House):
    house.add(steps=(1, 2, 3))
    house.remove(2)
    assert house.steps() == [1, 3]
    assert house.store.checkpoints.of_run("one")["step-000002"].deleted_at is not None
    with pytest.raises(ServiceError) as caught:
        house.remove(2)
    assert caught.value.status == 404


@pytest.mark.parametrize("state", [state for state in State if not state.final])
def test_the_newest_two_of_an_unfinished_run_stay(state: State, house: House):
    house.add(steps=(1, 2, 3, 4), state=state)
    house.remove(1)
    house.remove(2)
    for step in (3, 4):
        with pytest.raises(ServiceError, match="goes on from its newest two") as caught:
            house.remove(step)
        assert (caught.value.status, caught.value.code) == (409, "checkpoint_in_use")
    assert house.steps() == [3, 4]


def test_one_that_another_unfinished_run_names_as_a_model_stays_until_that_is_at_its_end(house: House):
    house.add(steps=(1, 2))
    house.add("two", state=State.RUNNING, teacher={"members": [{"model": house.model(1)}]})
    with pytest.raises(ServiceError, match="run two uses it"):
        house.remove(1)
    house.remove(2)
    house.store.runs.move("two", State.FAILED, "it failed")
    house.remove(1)
    assert house.steps() == []


def test_one_that_is_gone_before_a_run_can_begin_with_it_is_refused(house: House):
    house.add(steps=(1, 2))
    used = {"student": {"model": house.model(1)}, "runs": str(house.runs)}
    keep_used(house.runs, used)
    assert (house.runs / "one" / "checkpoints" / "step-000001" / KEPT).exists()
    house.remove(1)
    with pytest.raises(ServiceError, match="has just removed step-000001") as caught:
        keep_used(house.runs, used)
    assert (caught.value.status, caught.value.code) == (409, "checkpoint_gone")
    assert house.steps() == [2]


# A time that is over


def test_what_has_expired_is_removed_and_said_so_once(house: House):
    house.add(steps=(1, 2, 3))
    house.limit(1, -1.0)
    house.limit(2, 3600.0)
    for _ in range(2):
        expire(house.store, house.runs)
    assert house.steps() == [2, 3]
    assert house.told().count("checkpoint.expired") == 1


def test_what_somebody_needs_outlives_its_time_until_nobody_does(house: House):
    house.add(steps=(1, 2, 3, 4), state=State.RUNNING)
    house.publish(2, "mine")
    for step in (1, 2, 3, 4):
        house.limit(step, -1.0)
    expire(house.store, house.runs)
    assert house.steps() == [2, 3, 4]
    house.withdraw(2)
    expire(house.store, house.runs)
    assert house.steps() == [3, 4]
    house.store.runs.move("one", State.SUCCEEDED, "it succeeded")
    expire(house.store, house.runs)
    assert house.steps() == []


def test_one_that_the_run_has_removed_itself_is_not_asked_for_again(house: House):
    house.add(steps=(1,))
    house.limit(1, -1.0)
    shutil.rmtree(house.runs / "one" / "checkpoints" / "step-000001")
    expire(house.store, house.runs)
    assert house.store.checkpoints.expired(time.time()) == []


def test_a_step_that_is_saved_again_does_not_inherit_the_time_of_the_one_before(house: House):
    house.add(steps=(1,))
    house.limit(1, -1.0)
    expire(house.store, house.runs)
    make_checkpoint(house.runs / "one", 1)
    expire(house.store, house.runs)
    assert house.steps() == [1]


# Publishing


def test_a_published_model_is_the_checkpoints_byte_for_byte(house: House):
    house.add(steps=(1,))
    assert house.publish(1, "mine") is True
    place = house.runs / PUBLISHED / "mine"
    found = {f"model/{path.relative_to(place)}": path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert found == {name: content for name, content in FILES.items() if name.startswith("model/")}
    assert house.publish(1, "mine") is False
    assert os.listdir(house.runs / PUBLISHED) == ["mine"]


def test_a_published_model_outlives_the_folder_it_came_from(house: House):
    house.add(steps=(1,))
    house.publish(1, "mine")
    shutil.rmtree(house.runs / "one")
    assert (house.runs / PUBLISHED / "mine" / "config.json").read_bytes() == FILES["model/config.json"]


def test_a_name_is_one_checkpoints_and_a_checkpoint_has_one_name(house: House):
    house.add(steps=(1, 2))
    house.publish(1, "mine")
    for step, name in ((2, "mine"), (1, "other")):
        with pytest.raises(ServiceError) as caught:
            house.publish(step, name)
        assert caught.value.status == 409
    assert os.listdir(house.runs / PUBLISHED) == ["mine"]
    assert house.withdraw(1) == "mine"
    assert house.publish(2, "mine") is True


@pytest.mark.parametrize("how", ["flipped", "cut short", "gone"])
def test_a_damaged_model_is_not_published_and_its_name_stays_free(how: str, house: House):
    house.add(steps=(1, 2))
    weights = house.runs / "one" / "checkpoints" / "step-000001" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if how == "flipped":
        content[77] ^= 1
    weights.write_bytes(content[:-1] if how == "cut short" else content)
    if how == "gone":
        weights.unlink()
    with pytest.raises(ServiceError, match="is damaged") as caught:
        house.publish(1, "mine")
    assert (caught.value.status, caught.value.code) == (409, "checkpoint_damaged")
    assert not (house.runs / PUBLISHED / "mine").exists()
    assert house.publish(2, "mine") is True


def test_a_place_that_something_else_has_taken_is_refused_and_the_name_given_back(house: House):
    house.add(steps=(1,))
    (house.runs / PUBLISHED / "mine").mkdir(parents=True)
    (house.runs / PUBLISHED / "mine" / "config.json").write_text("the operator's")
    with pytest.raises(ServiceError, match="something else") as caught:
        house.publish(1, "mine")
    assert (caught.value.status, caught.value.code) == (409, "name_taken")
    assert house.store.checkpoints.of_run("one")["step-000001"].published_as is None
    assert (house.runs / PUBLISHED / "mine" / "config.json").read_text() == "the operator's"
    assert os.listdir(house.runs / PUBLISHED) == ["mine"]


def test_one_checkpoint_is_published_at_a_time(house: House):
    house.add(steps=(1, 2))
    refused: list[ServiceError] = []

    class Slow(type(house.store.checkpoints)):  # type: ignore[misc]
        def note(self, run_id: str, name: str, **changes: Any) -> Any:
            if name == "step-000001" and not refused:
                with pytest.raises(ServiceError) as caught:
                    house.publish(2, "other")
                refused.append(caught.value)
            return super().note(run_id, name, **changes)

    house.store.checkpoints = Slow(house.store.database)
    assert house.publish(1, "mine") is True
    assert (refused[0].status, refused[0].code) == (503, "publishing")
    assert house.publish(2, "other") is True


def test_a_service_that_is_killed_while_it_publishes_ends_it_when_it_is_asked_again(house: House):
    house.add(steps=(1,))
    house.store.checkpoints.note("one", "step-000001", published_as="mine")  # and then it was killed
    assert house.publish(1, "mine") is True
    assert (house.runs / PUBLISHED / "mine" / "config.json").exists()


def test_a_model_that_an_unfinished_run_uses_is_not_withdrawn(house: House):
    house.add(steps=(1,))
    house.publish(1, "mine")
    house.add("two", state=State.QUEUED, student={"model": os.path.realpath(house.runs / PUBLISHED / "mine")})
    with pytest.raises(ServiceError, match="run two uses it") as caught:
        house.withdraw(1)
    assert (caught.value.status, caught.value.code) == (409, "model_in_use")
    house.store.runs.move("two", State.CANCELLED, "it was cancelled")
    house.withdraw(1)
    assert not (house.runs / PUBLISHED / "mine").exists()
    with pytest.raises(ServiceError, match="not published") as caught:
        house.withdraw(1)
    assert caught.value.status == 404


def test_a_published_checkpoint_is_not_removed_and_neither_is_its_run(house: House):
    house.add(steps=(1,))
    house.publish(1, "mine")
    with pytest.raises(ServiceError, match="published as mine"):
        house.remove(1)
    for with_folder in (True, False):
        with pytest.raises(ServiceError, match="is published") as caught:
            house.forget(with_folder=with_folder)
        assert caught.value.status == 409
    assert house.steps() == [1]


# A whole run


def test_a_run_is_forgotten_with_its_folder_or_without(house: House):
    for name, with_folder in (("one", True), ("two", False)):
        house.add(name, steps=(1,))
        house.forget(name, with_folder=with_folder)
        assert not house.store.runs.exists(name)
        assert (house.runs / name).exists() is not with_folder
    expire(house.store, house.runs)
    assert house.steps("two") == [1]


def test_a_run_that_is_not_at_its_end_or_is_another_owners_stays_whole(house: House):
    house.add(steps=(1,), state=State.RUNNING)
    with pytest.raises(ServiceError, match="cancel it first") as caught:
        house.forget()
    assert caught.value.status == 409
    house.store.runs.move("one", State.SUCCEEDED, "it succeeded")
    with pytest.raises(ServiceError) as caught:
        house.forget(who=BOB)
    assert caught.value.status == 404
    expire(house.store, house.runs)
    assert house.steps() == [1]


def test_a_run_whose_process_still_works_is_not_removed(house: House):
    house.add(steps=(1,))
    with (house.runs / "one" / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ServiceError, match="still at work") as caught:
            house.forget()
        assert (caught.value.status, caught.value.code) == (409, "run_is_active")
    house.forget()
    assert not (house.runs / "one").exists()


def test_a_run_of_which_another_one_uses_a_checkpoint_is_not_removed(house: House):
    house.add(steps=(1,))
    house.add("two", state=State.RUNNING, student={"model": house.model(1)})
    with pytest.raises(ServiceError, match="run two uses a checkpoint"):
        house.forget()
    assert house.store.runs.exists("one")
    house.forget(with_folder=False)
    assert house.steps() == [1]


def test_links_in_a_run_are_removed_and_what_they_lead_to_is_not(house: House, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    house.add(steps=(1,))
    (house.runs / "one" / "out").symlink_to(tmp_path / "precious")
    (house.runs / "one" / "lock").symlink_to(tmp_path / "precious" / "file")
    house.forget()
    house.add("two")
    (house.runs / "two").rmdir()
    (house.runs / "two").symlink_to(tmp_path / "precious")
    house.forget("two")
    assert {path.name for path in house.runs.iterdir()} <= {DOOMED}
    assert (tmp_path / "precious" / "file").read_text() == "kept"


def test_a_run_that_has_no_folder_is_forgotten_all_the_same(house: House):
    house.add()
    (house.runs / "one").rmdir()
    house.forget()
    assert not house.store.runs.exists("one")


def test_a_service_that_is_killed_after_the_row_is_gone_removes_the_folder_when_it_is_back(house: House):
    house.add(steps=(1,))

    class Dying(type(house.store.runs)):  # type: ignore[misc]
        def delete(self, run_id: str, viewer: Principal) -> None:
            super().delete(run_id, viewer)
            raise Killed

    runs, house.store.runs = house.store.runs, Dying(house.store.database)
    with pytest.raises(Killed):
        house.forget()
    house.store.runs = runs
    assert (house.runs / "one").exists()
    expire(house.store, house.runs)
    assert not (house.runs / "one").exists()
    assert os.listdir(house.runs / DOOMED) == []


def test_what_was_half_removed_is_swept_away_and_nothing_else_is(house: House):
    house.add(steps=(1,))
    (house.runs / ".gone.0123abcd" / "checkpoints").mkdir(parents=True)
    (house.runs / PUBLISHED).mkdir()
    (house.runs / ".lock").touch()
    expire(house.store, house.runs)
    assert {path.name for path in house.runs.iterdir()} == {"one", PUBLISHED, ".lock"}
    assert house.steps() == [1]


def test_a_doomed_run_that_still_has_its_row_is_left_alone(house: House):
    house.add(steps=(1,))
    (house.runs / DOOMED).mkdir()
    (house.runs / DOOMED / "one").touch()  # a service was killed before it had deleted the row
    expire(house.store, house.runs)
    assert house.steps() == [1]
    house.forget(with_folder=False)  # and then the client changed its mind
    expire(house.store, house.runs)
    assert house.steps() == [1]


def test_digests_of_a_published_model_are_those_of_the_manifest(house: House):
    house.add(steps=(1,))
    house.publish(1, "mine")
    (checkpoint,) = checkpoints_of(house.runs, "one")
    for name, stored in checkpoint.files.items():
        if name.startswith("model/"):
            content = (house.runs / PUBLISHED / "mine" / name.removeprefix("model/")).read_bytes()
            assert hashlib.sha256(content).hexdigest() == stored.sha256
