"""Replicas of one teacher: the next is asked when one is away, and nobody else is ever believed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from potstill.errors import AlignmentError, PotstillError, TeacherRefused, TeacherUnavailable, TokenizerMismatch
from potstill.teachers.replicas import Replicas
from potstill.types import TeacherIdentity, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem
from tests.builders_teacher import IDENTITY, item, sound_scores
from tests.teacher_tables import offering

OTHER = TeacherIdentity(name="tiny", revision="r2", tokenizer_fingerprint="f1")


class Server:
    """A scorer that answers as `identity`, or raises `error` while it has one."""

    def __init__(self, *, error: PotstillError | None = None, identity: TeacherIdentity = IDENTITY) -> None:
        self.error = error
        self._identity = identity
        self.calls = 0
        self.expected: list[TeacherIdentity | None] = []
        self.closed = False

    async def capabilities(self) -> Capabilities:
        await self._answers()
        return offering(self._identity)

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: TeacherIdentity | None) -> list[TeacherScores]:
        self.expected.append(expect)
        await self._answers()
        if expect is not None and expect != self._identity:
            raise TeacherRefused("another revision is served here")
        return [sound_scores(one, ask=ask) for one in items]

    async def aclose(self) -> None:
        self.closed = True

    async def _answers(self) -> None:
        self.calls += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error


def away() -> Server:
    return Server(error=TeacherUnavailable("away"))


async def score(replicas: Replicas, expect: TeacherIdentity | None = IDENTITY) -> list[TeacherScores]:
    return await replicas.score([item()], Ask(), expect)


async def test_the_first_is_asked_and_no_other():
    first, second = Server(), Server()
    assert len(await score(Replicas([first, second]))) == 1
    assert (first.calls, second.calls) == (1, 0)


async def test_the_next_answers_for_one_that_is_away_and_is_asked_first_from_then_on():
    first, second, third = away(), away(), Server()
    replicas = Replicas([first, second, third])
    await score(replicas)
    first.error = None
    await score(replicas)
    assert [server.calls for server in (first, second, third)] == [1, 1, 2]
    third.error = TeacherUnavailable("away")
    await score(replicas)
    assert [server.calls for server in (first, second, third)] == [2, 1, 3]


async def test_requests_that_find_it_away_at_the_same_time_all_reach_the_next():
    first, second = away(), Server()
    replicas = Replicas([first, second])
    assert len(await asyncio.gather(*(score(replicas) for _ in range(5)))) == 5
    assert (first.calls, second.calls) == (5, 5)


async def test_where_all_are_away_the_last_ones_error_is_raised_and_each_was_asked_once():
    servers = [away(), Server(error=TeacherUnavailable("the last"))]
    with pytest.raises(TeacherUnavailable, match="the last"):
        await score(Replicas(servers))
    assert [server.calls for server in servers] == [1, 1]


@pytest.mark.parametrize("error", [TeacherRefused("no"), AlignmentError("odd"), TokenizerMismatch("other tokens")])
async def test_only_a_server_that_is_away_is_passed_over(error: PotstillError):
    second = Server()
    with pytest.raises(type(error)):
        await score(Replicas([Server(error=error), second]))
    assert second.calls == 0


async def test_a_replica_of_another_revision_is_no_stand_in():
    with pytest.raises(TeacherRefused, match="another revision"):
        await score(Replicas([away(), Server(identity=OTHER)]))


async def test_without_an_expected_identity_that_of_the_first_answer_is_expected_of_all():
    first, second = Server(), Server(identity=OTHER)
    replicas = Replicas([first, second])
    await score(replicas, expect=None)
    assert first.expected == [IDENTITY]


async def test_replicas_are_compared_when_they_are_met():
    assert (await Replicas([Server(), Server()]).capabilities()).identity == IDENTITY
    with pytest.raises(TeacherRefused, match=r"teacher\.replicas: tiny r2 is not tiny r1"):
        await Replicas([Server(), Server(identity=OTHER)]).capabilities()


async def test_a_replica_that_is_away_when_they_are_met_is_compared_when_it_answers():
    late = Server(error=TeacherUnavailable("away"), identity=OTHER)
    first = Server()
    replicas = Replicas([first, late])
    assert (await replicas.capabilities()).identity == IDENTITY
    first.error, late.error = TeacherUnavailable("away"), None
    with pytest.raises(TeacherRefused):
        await score(replicas)


async def test_all_are_closed():
    servers = [Server(), away()]
    await Replicas(servers).aclose()
    assert all(server.closed for server in servers)
