"""Several teachers as one, against the mean of whole distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from potstill.alignment import aligned
from potstill.errors import ConfigError, TeacherRefused, TokenizerMismatch
from potstill.teachers.several import Seat, Several
from potstill.types import ScoreStatus, TeacherIdentity, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreItem, ScoreRequest, ScoreResponse, unscored
from tests.builders_teacher import ids

VOCABULARY, LENGTH = 12, 5


class Distribution:
    """A scorer that has one table of probabilities [LENGTH, VOCABULARY] for every completion."""

    def __init__(self, name: str, *, seed: int, fingerprint: str = "f", failing: bool = False) -> None:
        logits = 2 * np.random.default_rng(seed).normal(size=(LENGTH, VOCABULARY))
        self.table = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        self.identity = TeacherIdentity(name=name, revision=f"r{seed}", tokenizer_fingerprint=fingerprint)
        self._failing = failing
        self.closed = False

    async def capabilities(self) -> Capabilities:
        return Capabilities(
            model=self.identity.name,
            revision=self.identity.revision,
            tokenizer_fingerprint=self.identity.tokenizer_fingerprint,
            tier=3,
            context_length=64,
            vocabulary=VOCABULARY,
            max_items=8,
            max_tokens=1000,
            max_top_k=VOCABULARY,
            max_body_bytes=2**20,
            hidden_size=0,
            head_id="",
        )

    async def score(self, items: Sequence[ScoreItem], ask: Ask, expect: TeacherIdentity | None) -> list[TeacherScores]:
        assert expect == self.identity
        return [self._one(item, ask) for item in items]

    async def aclose(self) -> None:
        self.closed = True

    def _one(self, item: ScoreItem, ask: Ask) -> TeacherScores:
        if self._failing:
            return unscored(self.identity, ScoreStatus.FAILED, num_tokens=LENGTH, ask=ask)
        return of_table(self.table, item, ask, self.identity)


def of_table(table: np.ndarray, item: ScoreItem, ask: Ask, identity: TeacherIdentity) -> TeacherScores:
    """What a teacher with these log-probs answers, written out."""
    top = np.argsort(-table, axis=1, kind="stable")[:, : ask.top_k].astype(np.int32)

    def kept(chosen: np.ndarray) -> np.ndarray:
        return np.take_along_axis(table, chosen, axis=1).astype(np.float32)

    def tail(chosen: np.ndarray) -> np.ndarray:
        left = np.exp(table)
        np.put_along_axis(left, chosen, 0.0, axis=1)
        with np.errstate(divide="ignore"):
            return np.log(left.sum(axis=1)).astype(np.float32)

    return TeacherScores(
        status=ScoreStatus.OK,
        identity=identity,
        sampled=kept(item.completion_ids[:, None])[:, 0],
        topk_ids=top if ask.top_k else None,
        topk_logprobs=kept(top) if ask.top_k else None,
        topk_tail=tail(top) if ask.top_k else None,
        ids_logprobs=None if item.token_ids is None else kept(item.token_ids),
        ids_tail=None if item.token_ids is None else tail(item.token_ids),
    )


def an_item(name: str, *, domain: str | None, token_ids: np.ndarray | None = None) -> ScoreItem:
    return ScoreItem(id=name, context_ids=ids(1), completion_ids=ids(3, 4, 5, 6, 0), token_ids=token_ids, domain=domain)


def seated(*members: tuple[Distribution, float, set[str]]) -> Several:
    return Several(
        {
            one.identity.name: Seat(scorer=one, weight=weight, domains=frozenset(domains))
            for one, weight, domains in members
        }
    )


def mean_table(*shares: tuple[Distribution, float]) -> np.ndarray:
    return np.log(sum(share * np.exp(one.table) for one, share in shares))


async def test_each_domain_is_scored_by_its_own_teacher_and_order_is_kept():
    maths, code = Distribution("maths", seed=1), Distribution("code", seed=2)
    several = seated((maths, 1, {"maths"}), (code, 1, {"code"}))
    items = [an_item("a", domain="code"), an_item("b", domain="maths"), an_item("c", domain="code")]
    answers = await several.score(items, Ask(top_k=2), None)
    for item, who, answer in zip(items, (code, maths, code), answers, strict=True):
        assert answer.identity == who.identity
        np.testing.assert_array_equal(answer.sampled, of_table(who.table, item, Ask(top_k=2), who.identity).sampled)


async def test_a_domain_that_nobody_has_is_an_error_that_names_it():
    several = seated((Distribution("maths", seed=1), 1, {"maths"}), (Distribution("code", seed=2), 1, {"code"}))
    with pytest.raises(ConfigError, match="'law'"):
        await several.score([an_item("a", domain="law")], Ask(), None)


@pytest.mark.parametrize("ask", [Ask(), Ask(num_ids=3), Ask(top_k=3), Ask(top_k=2, num_ids=3)])
async def test_a_mean_is_the_mean_of_the_probabilities_and_passes_the_gate(ask: Ask):
    one, other = Distribution("one", seed=1), Distribution("other", seed=2)
    several = seated((one, 3, set()), (other, 1, set()))
    chosen = np.array([[0, 5, 3], [1, 2, 4], [5, 7, 9], [6, 0, 1], [0, 10, 11]], np.int32) if ask.num_ids else None
    item = an_item("a", domain=None, token_ids=chosen)
    (answer,) = await several.score([item], ask, None)
    table = mean_table((one, 0.75), (other, 0.25))
    expected = of_table(table, item, ask, answer.identity)
    for name in ("sampled", "ids_logprobs", "ids_tail"):
        if (value := getattr(expected, name)) is not None:
            np.testing.assert_allclose(getattr(answer, name), value, rtol=1e-5, atol=1e-6, err_msg=name)
    if ask.top_k:
        found = replace(item, token_ids=answer.topk_ids)
        kept = of_table(table, found, Ask(num_ids=ask.top_k), answer.identity)
        np.testing.assert_allclose(answer.topk_logprobs, kept.ids_logprobs, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(answer.topk_tail, kept.ids_tail, rtol=1e-5, atol=1e-6)
    request = ScoreRequest(model=answer.identity.name, items=(item,), ask=ask)
    aligned(request, ScoreResponse(request_id="q", identity=answer.identity, ids=("a",), scores=(answer,)), None)


async def test_one_teacher_twice_is_that_teacher():
    one, again = Distribution("one", seed=1), Distribution("again", seed=1)
    (answer,) = await seated((one, 1, set()), (again, 5, set())).score([an_item("a", domain=None)], Ask(top_k=4), None)
    alone = of_table(one.table, an_item("a", domain=None), Ask(top_k=4), one.identity)
    np.testing.assert_array_equal(answer.topk_ids, alone.topk_ids)
    np.testing.assert_allclose(answer.topk_logprobs, alone.topk_logprobs, rtol=1e-6)


async def test_a_member_that_failed_leaves_no_mean_and_spares_other_items():
    good, bad = Distribution("good", seed=1), Distribution("bad", seed=2, failing=True)
    several = seated((good, 1, set()), (bad, 1, {"maths"}))
    hit, spared = await several.score([an_item("a", domain="maths"), an_item("b", domain="law")], Ask(top_k=2), None)
    assert hit.status == ScoreStatus.FAILED
    assert np.isnan(hit.sampled).all()
    assert np.isnan(hit.topk_logprobs).all()
    assert spared.status == ScoreStatus.OK


@pytest.mark.parametrize("ask", [Ask(entropy=True), Ask(draws=2), Ask(hidden=4)])
async def test_what_a_mean_cannot_give_is_refused(ask: Ask):
    several = seated((Distribution("one", seed=1), 1, set()), (Distribution("other", seed=2), 1, set()))
    with pytest.raises(TeacherRefused, match="no entropy, draws or states"):
        await several.score([an_item("a", domain=None)], ask, None)


async def test_teachers_of_different_tokens_are_refused():
    several = seated((Distribution("one", seed=1), 1, set()), (Distribution("b", seed=2, fingerprint="g"), 1, set()))
    with pytest.raises(TokenizerMismatch, match="one, b"):
        await several.capabilities()


async def test_the_identity_of_a_mean_changes_with_weights_and_members_and_is_held():
    one, other = Distribution("one", seed=1), Distribution("other", seed=2)
    even, uneven = seated((one, 1, set()), (other, 1, set())), seated((one, 1, set()), (other, 2, set()))
    first, second = (await even.capabilities()).identity, (await uneven.capabilities()).identity
    assert first != second
    with pytest.raises(TeacherRefused, match="no longer"):
        await uneven.score([an_item("a", domain=None)], Ask(), first)
    await even.aclose()
    assert one.closed
    assert other.closed
