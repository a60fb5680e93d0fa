"""EchoScorer against scripted endpoints that echo a prompt, each in some real dialect, truly or falsely."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.algebra.objective import Tier
from potstill.errors import AlignmentError, TeacherRefused, TokenizerMismatch
from potstill.teachers.echoing import EchoScorer
from potstill.tokenization import fingerprint
from potstill.types import ScoreStatus, TeacherIdentity, TeacherScores
from potstill.wire import Ask, ScoreItem
from tests.builders_teacher import item
from tests.endpoints import Said, Scripted, endpoint, scripted
from tests.tiny_models import VOCABULARY, save_tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONTEXT, COMPLETION = TOKENIZER.encode("2+3="), TOKENIZER.encode("5.\n")
TEXT = np.array(TOKENIZER.encode("".join(map(chr, range(32, 127)))))  # ids that are one character each
Logprobs = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("copy") / "tiny", seed=0)


def law(length: int) -> np.ndarray:
    """[L, V] log-probs before each token of a prompt, with next to nothing outside the printable characters."""
    logits = 3 * np.random.default_rng(7).normal(size=(length, VOCABULARY)) - 30
    logits[:, TEXT] += 30
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


class Echo:
    """An endpoint that knows some of the dialects. `change` may spoil the log-probs of an answer."""

    def __init__(
        self,
        *,
        takes_ids: bool = True,
        names_ids: bool = True,
        strict: bool = False,
        most: int = 5,
        tells_ids: bool = False,
        writes: bool = True,
        change: Callable[[Logprobs], Logprobs] = lambda logprobs: logprobs,
    ) -> None:
        self.takes_ids, self.names_ids, self.strict, self.most = takes_ids, names_ids, strict, most
        self.tells_ids, self.writes, self.change = tells_ids, writes, change

    def __call__(self, path: str, asked: Any) -> Said:
        prompt = asked["prompt"]
        if path != "/v1/completions":
            return 404, {"error": {"message": "no such route"}}
        if isinstance(prompt, list) and not self.takes_ids:
            return 422, {"detail": "prompt must be a string"}
        if "return_tokens_as_token_ids" in asked and self.strict:
            return 400, {"error": {"message": "Unrecognized request argument", "code": None}}
        if asked["logprobs"] > self.most:
            return 400, {"error": {"message": f"logprobs must be at most {self.most}", "param": "logprobs"}}
        ids = prompt if isinstance(prompt, list) else TOKENIZER.encode(prompt)
        named = self.names_ids and asked.get("return_tokens_as_token_ids", False)
        logprobs = self.logprobs(ids, asked["logprobs"], (lambda token: f"token_id:{token}") if named else one_text)
        choice = {"index": 0, "text": "", "logprobs": self.change(logprobs), "finish_reason": "length"}
        if self.tells_ids:
            choice["prompt_token_ids"] = ids
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": [choice]}

    def logprobs(self, ids: list[int], top_k: int, name: Callable[[int], str]) -> Logprobs:
        said = [*ids, int(TEXT[0])] if self.writes else ids
        rows = law(len(said))[1:]
        best = [np.argsort(-row)[:top_k].tolist() for row in rows]
        top = [
            {name(one): float(row[one]) for one in dict.fromkeys([token, *ones])}
            for row, token, ones in zip(rows, said[1:], best, strict=True)
        ]
        return {
            "text_offset": list(range(len(said))),
            "token_logprobs": [None, *(float(row[token]) for row, token in zip(rows, said[1:], strict=True))],
            "tokens": [name(token) for token in said],
            "top_logprobs": [None, *top] if top_k else None,
        }


def one_text(token: int) -> str:
    return str(TOKENIZER.decode([token]))


def teacher(server: Scripted, folder: Path) -> EchoScorer:
    return EchoScorer(endpoint(server.url), model="m", revision=None, tokenizer=folder, context_length=64)


async def ask(echo: Echo, folder: Path, wanted: Ask, asked: ScoreItem | None = None) -> TeacherScores:
    with scripted(echo) as server:
        client = teacher(server, folder)
        (scores,) = await client.score([asked or item(context=CONTEXT, completion=COMPLETION)], wanted, None)
        await client.aclose()
    return scores


DIALECTS = {
    "ids that name ids": Echo(),
    "ids that are told as well": Echo(tells_ids=True, strict=True),
    "ids": Echo(strict=True),
    "ids, named by text all the same": Echo(names_ids=False),
    "text": Echo(takes_ids=False, names_ids=False),
    "nothing is written after the prompt": Echo(writes=False),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("top_k", [0, 3])
async def test_every_dialect_gives_the_same_scores(dialect: str, top_k: int, folder: Path):
    scores = await ask(DIALECTS[dialect], folder, Ask(top_k=top_k))
    wanted = law(8)[len(CONTEXT) : len(CONTEXT) + len(COMPLETION)]
    if dialect == "nothing is written after the prompt":
        wanted = law(7)[len(CONTEXT) :]
    assert scores.status == ScoreStatus.OK
    np.testing.assert_allclose(
        scores.sampled, np.take_along_axis(wanted, np.array(COMPLETION)[:, None], 1)[:, 0], rtol=1e-6
    )
    if top_k:
        best = np.argsort(-wanted, axis=1)[:, :top_k]
        at = np.take_along_axis(wanted, best, 1)
        np.testing.assert_array_equal(scores.topk_ids, best)
        np.testing.assert_allclose(scores.topk_logprobs, at, rtol=1e-6)
        np.testing.assert_allclose(scores.topk_tail, np.log(1 - np.exp(at).sum(axis=1)), rtol=1e-3)


@pytest.mark.parametrize(("most", "found"), [(0, 0), (1, 1), (5, 5), (20, 20), (100, 20)])
async def test_the_largest_top_k_is_found_by_asking(most: int, found: int, folder: Path):
    with scripted(Echo(most=most)) as server:
        client = teacher(server, folder)
        able = await client.capabilities()
        await client.aclose()
    assert (able.max_top_k, able.tier) == (found, Tier.TOPK if found else Tier.SAMPLED)
    assert able.identity == TeacherIdentity(
        name="m", revision="unversioned", tokenizer_fingerprint=fingerprint(TOKENIZER)
    )


async def test_temperature_1_is_sent_because_some_endpoints_temper_what_they_echo(folder: Path):
    with scripted(Echo()) as server:
        client = teacher(server, folder)
        await client.score([item(context=CONTEXT, completion=COMPLETION)], Ask(), None)
        await client.aclose()
    assert {asked["temperature"] for _, asked in server.asked} == {1.0}


# -------------------------------------------------------------------------------------------------- false answers


def spoil(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[Logprobs], Logprobs]:
    """Change one list of an answer to a prompt that is not the trial's."""

    def changed(logprobs: Logprobs) -> Logprobs:
        ours = len(CONTEXT) + len(COMPLETION) + 1 == len(logprobs["tokens"])
        return logprobs | {name: change(logprobs[name])} if ours else logprobs

    return changed


def at(index: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    """Put `value`, or what it makes of what is there, in one place."""

    def changed(values: list[Any]) -> list[Any]:
        new = value(values[index]) if callable(value) else value
        return [*values[:index], new, *values[index + 1 :]]

    return changed


FAILURES: dict[str, Callable[[Logprobs], Logprobs]] = {
    "another token of the completion": spoil("tokens", at(5, "X")),
    "another token of the context": spoil("tokens", at(1, "X")),
    "a token put in front, as some do": spoil("tokens", lambda tokens: ["<s>", *tokens[:-1]]),
    "two tokens are swapped": spoil("tokens", lambda tokens: [*tokens[:4], tokens[5], tokens[4], *tokens[6:]]),
    "a token is missing": spoil("tokens", lambda tokens: tokens[:-2]),
    "a log-prob is missing": spoil("token_logprobs", lambda values: values[1:]),
    "the first is not null": spoil("token_logprobs", at(0, -1.0)),
    "another is null": spoil("token_logprobs", at(5, None)),
    "one is the number for none": spoil("token_logprobs", at(5, -9999.0)),
    "one is no number": spoil("token_logprobs", at(5, float("nan"))),
    "a row is null": spoil("top_logprobs", at(5, None)),
    "a row is missing": spoil("top_logprobs", lambda rows: rows[:-1]),
    "a row is short": spoil("top_logprobs", at(5, lambda row: dict(list(row.items())[:2]))),
    "a row is long": spoil("top_logprobs", at(5, lambda row: row | {"!": -40.0, '"': -41.0})),
    "a text that no token has": spoil("top_logprobs", at(5, lambda row: {"the": -0.1, "!": -5.0, "#": -6.0})),
    "a text that many tokens have": spoil("top_logprobs", at(5, lambda row: {"\ufffd": -0.1, "!": -5.0, "#": -6.0})),
    "a token beside the top-k that is not the completion's": spoil(
        "top_logprobs", at(5, lambda row: {"!": -0.1, "#": -3.0, "$": -6.0, "%": -7.0})
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_an_answer_that_cannot_be_matched_fails_its_item(failure: str, folder: Path):
    scores = await ask(Echo(strict=True, change=FAILURES[failure]), folder, Ask(top_k=3))
    assert scores.status == ScoreStatus.FAILED
    assert np.isnan(scores.sampled).all()
    assert np.isnan(scores.topk_logprobs).all()


@pytest.mark.parametrize("value", [0.5, 1e9])
async def test_a_log_prob_above_0_is_an_alignment_error(value: float, folder: Path):
    with pytest.raises(AlignmentError):
        await ask(Echo(strict=True, change=spoil("token_logprobs", at(5, value))), folder, Ask())


async def test_ids_that_no_text_stands_for_are_not_sent_to_an_endpoint_that_takes_text(folder: Path):
    half_a_letter = item(context=CONTEXT, completion=[int(TOKENIZER.encode("é")[0])])
    echo = Echo(takes_ids=False, names_ids=False)
    with scripted(echo) as server:
        client = teacher(server, folder)
        await client.capabilities()
        sent = len(server.asked)
        (scores,) = await client.score([half_a_letter], Ask(), None)
        await client.aclose()
    assert (scores.status, len(server.asked)) == (ScoreStatus.FAILED, sent)
    assert (await ask(Echo(), folder, Ask(), half_a_letter)).status == ScoreStatus.OK


# ------------------------------------------------------------------------------------------------------- refusals


class ChatOnly:
    def __init__(self, status: int) -> None:
        self.status = status

    def __call__(self, path: str, asked: Any) -> Said:
        return self.status, {"error": {"message": "This is a chat model", "type": "invalid_request_error"}}


@pytest.mark.parametrize("status", [400, 404, 405, 422, 501])
async def test_an_endpoint_that_only_writes_says_so_and_refuses_to_score(status: int, folder: Path):
    with scripted(ChatOnly(status)) as server:
        client = teacher(server, folder)
        able = await client.capabilities()
        assert (able.tier, able.max_top_k) == (Tier.TEXT, 0)
        with pytest.raises(TeacherRefused, match="writes text but scores none"):
            await client.score([item()], Ask(), None)
        await client.aclose()


async def test_an_endpoint_that_ignores_echo_scores_nothing(folder: Path):
    class Deaf(Echo):
        def logprobs(self, ids: list[int], top_k: int, name: Callable[[int], str]) -> Logprobs:
            return {"tokens": ["!"], "token_logprobs": [-0.1], "top_logprobs": None, "text_offset": [0]}

    class Other(Echo):
        def logprobs(self, ids: list[int], top_k: int, name: Callable[[int], str]) -> Logprobs:
            return {"content": [{"token": "!", "logprob": -0.1}]}

    for echo in (Deaf(), Other()):
        with scripted(echo) as server:
            client = teacher(server, folder)
            assert (await client.capabilities()).tier == Tier.TEXT
            await client.aclose()


async def test_a_wrong_key_is_not_mistaken_for_an_endpoint_without_scores(folder: Path):
    with scripted(ChatOnly(401)) as server:
        client = teacher(server, folder)
        with pytest.raises(TeacherRefused, match="401"):
            await client.capabilities()
        await client.aclose()


@pytest.mark.parametrize(
    ("asked", "wanted", "message"),
    [
        (item(token_ids=[[1], [2], [3]]), Ask(num_ids=1), "does not score ids that the caller chooses"),
        (item(), Ask(entropy=True), "no entropy"),
        (item(), Ask(top_k=6), "top_k is 6; m gives 5"),
        (item(completion=[1] * 62), Ask(), "64 tokens; m reads 63"),
        (item(completion=[VOCABULARY]), Ask(), "outside the 259 tokens"),
    ],
)
async def test_what_it_cannot_be_asked_is_refused(asked: ScoreItem, wanted: Ask, message: str, folder: Path):
    with pytest.raises(TeacherRefused, match=message):
        await ask(Echo(), folder, wanted, asked)


async def test_another_teacher_than_the_one_expected_is_refused(folder: Path):
    with scripted(Echo()) as server:
        client = teacher(server, folder)
        expect = TeacherIdentity(name="m", revision="unversioned", tokenizer_fingerprint="f")
        with pytest.raises(TokenizerMismatch):
            await client.score([item()], Ask(), expect)
        await client.aclose()
