"""VllmScorer against a scripted vLLM: answers in the JSON of vLLM's own protocol classes, true ones and false ones."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.algebra.objective import Tier
from potstill.errors import AlignmentError, PotstillError, TeacherRefused, TokenizerMismatch
from potstill.teachers.vllm import VllmScorer
from potstill.tokenization import fingerprint, render
from potstill.types import Message, ScoreStatus, TeacherIdentity, TeacherScores
from potstill.wire import Ask, ScoreItem
from tests.builders_teacher import item
from tests.endpoints import Said, Scripted, endpoint, scripted
from tests.tiny_models import VOCABULARY, save_tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MAX_MODEL_LEN = 64
Rows = list[Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("copy") / "tiny", seed=0)


def law(length: int) -> np.ndarray:
    """[L, V] log-probs before each token of a prompt: whatever the prompt, for this teacher."""
    logits = 3 * np.random.default_rng(7).normal(size=(length, VOCABULARY))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def entry(logprobs: np.ndarray, token: int) -> dict[str, Any]:
    rank = int((logprobs >= logprobs[token]).sum())
    return {"logprob": float(logprobs[token]), "rank": rank, "decoded_token": TOKENIZER.decode([token])}


def rows_of(prompt: list[int], top_k: int) -> Rows:
    """As vLLM writes them: null, then the token itself and the most probable ones, each once."""
    rows: Rows = [None]
    for logprobs, token in zip(law(len(prompt))[1:], prompt[1:], strict=True):
        best = np.argsort(-logprobs)[:top_k].tolist()
        rows.append({str(one): entry(logprobs, one) for one in dict.fromkeys([token, *best])})
    return rows


class Vllm:
    """A server whose `change` may spoil the rows of a prompt that is not a probe's."""

    def __init__(
        self,
        *,
        max_logprobs: int = 5,
        scores_ids: bool = False,
        has_tokenize: bool = True,
        change: Callable[[Rows], Rows] = lambda rows: rows,
        array: Callable[[np.ndarray], Any] = lambda array: array,
    ) -> None:
        self.max_logprobs = max_logprobs
        self.scores_ids = scores_ids
        self.has_tokenize = has_tokenize
        self.change = change
        self.array = array

    def __call__(self, path: str, asked: Any) -> Said:
        if path == "/v1/models":
            card = {"id": "big", "object": "model", "owned_by": "vllm", "max_model_len": MAX_MODEL_LEN}
            return 200, {"object": "list", "data": [card]}
        if path == "/tokenize" and self.has_tokenize:
            tokens = TOKENIZER.encode(asked["prompt"], add_special_tokens=asked["add_special_tokens"])
            return 200, {"count": len(tokens), "max_model_len": MAX_MODEL_LEN, "tokens": tokens, "token_strs": None}
        if path == "/detokenize" and self.has_tokenize:
            return 200, {"prompt": TOKENIZER.decode(asked["tokens"])}
        if path == "/v1/completions":
            return self.complete(asked)
        if path == "/inference/v1/generate" and self.scores_ids:
            return self.generate(asked)
        return 404, {"detail": "Not Found"}

    def complete(self, asked: Any) -> Said:
        if asked["prompt_logprobs"] > self.max_logprobs:
            message = f"Requested prompt logprobs of {asked['prompt_logprobs']}, which is greater than max allowed: 5"
            return 400, {
                "error": {"message": message, "type": "BadRequestError", "param": "prompt_logprobs", "code": 400}
            }
        choice = {
            "index": 0,
            "text": "!",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [0],
            "prompt_logprobs": self.rows(asked["prompt"], asked["prompt_logprobs"]),
            "prompt_token_ids": asked["prompt"] if asked["return_token_ids"] else None,
            "routed_experts": None,
        }
        usage = {
            "prompt_tokens": len(asked["prompt"]),
            "total_tokens": len(asked["prompt"]) + 1,
            "completion_tokens": 1,
        }
        body = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": "big", "usage": usage}
        return 200, body | {"choices": [choice]}

    def generate(self, asked: Any) -> Said:
        sampling, prompt = asked["sampling_params"], asked["token_ids"]
        start, ids = sampling["prompt_logprob_start"], np.array(sampling["prompt_logprob_token_ids"])
        if len(ids) != len(prompt) - 1 - start:
            return 400, {"error": {"message": "rows", "type": "BadRequestError", "code": 400}}
        scores = np.take_along_axis(law(len(prompt))[start + 1 :], ids, 1).astype(np.float32)
        file = io.BytesIO()
        np.save(file, self.array(scores))
        choices = [{"index": 0, "finish_reason": "length", "token_ids": [0], "logprobs": None}]
        return 200, {
            "request_id": "1",
            "choices": choices,
            "prompt_logprobs": self.rows(prompt, sampling["prompt_logprobs"]),
            "prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode(),
            "prompt_token_ids": prompt,
            "output_mode": "tokens",
        }

    def rows(self, prompt: list[int], top_k: int) -> Rows:
        rows = rows_of(prompt, top_k)
        return rows if len(prompt) == 2 else self.change(rows)


def teacher(server: Scripted, folder: Path, *, revision: str | None = "r1", model: str = "big") -> VllmScorer:
    return VllmScorer(endpoint(server.url), model=model, revision=revision, tokenizer=folder)


async def ask(vllm: Vllm, folder: Path, asked: ScoreItem, wanted: Ask, expect: Any = None) -> TeacherScores:
    with scripted(vllm) as server:
        client = teacher(server, folder)
        (scores,) = await client.score([asked], wanted, expect)
        await client.aclose()
    return scores


# --------------------------------------------------------------------------------------------------- true answers


async def test_every_column_is_what_the_server_said_of_the_completions_tokens(folder: Path):
    asked = item(context=[1, 2, 3], completion=[4, 5, 6, 7], token_ids=[[8, 4], [9, 5], [10, 11], [0, 1]])
    scores = await ask(Vllm(scores_ids=True), folder, asked, Ask(top_k=3, num_ids=2))
    wanted = law(7)[3:]
    best = np.argsort(-wanted, axis=1)[:, :3]
    np.testing.assert_allclose(scores.sampled, wanted[np.arange(4), [4, 5, 6, 7]], rtol=1e-6)
    np.testing.assert_array_equal(scores.topk_ids, best)
    for logprobs, tail, ids in (
        (scores.topk_logprobs, scores.topk_tail, best),
        (scores.ids_logprobs, scores.ids_tail, asked.token_ids),
    ):
        at = np.take_along_axis(wanted, ids, 1)
        np.testing.assert_allclose(logprobs, at, rtol=1e-6)
        np.testing.assert_allclose(tail, np.log(1 - np.exp(at).sum(axis=1)), rtol=1e-4)
    assert scores.identity == TeacherIdentity(name="big", revision="r1", tokenizer_fingerprint=fingerprint(TOKENIZER))


async def test_a_teachers_own_context_stands_before_the_completion(folder: Path):
    messages = (Message(role="user", content="hi"),)
    with scripted(Vllm()) as server:
        client = teacher(server, folder)
        items = [
            item("ids", context=[1], completion=[5, 6], teacher_context=[7, 8, 9]),
            item("said", context=[1], completion=[5, 6], messages=messages),
        ]
        scores = await client.score(items, Ask(), None)
        await client.aclose()
    prompts = [asked["prompt"] for path, asked in server.asked if path == "/v1/completions"]
    for one, context in zip(scores, ([7, 8, 9], render(TOKENIZER, messages)), strict=True):
        assert [*context, 5, 6] in prompts
        np.testing.assert_allclose(one.sampled, law(len(context) + 2)[-2:][[0, 1], [5, 6]], rtol=1e-6)


async def test_no_temperature_and_no_other_sampling_is_sent(folder: Path):
    with scripted(Vllm()) as server:
        client = teacher(server, folder)
        await client.score([item()], Ask(top_k=2), None)
        await client.aclose()
    assert server.asked[-1][1].keys() == {"model", "prompt", "max_tokens", "prompt_logprobs", "return_token_ids"}


@pytest.mark.parametrize("most", [0, 1, 5, 20, 127, 128, 500])
async def test_the_largest_top_k_is_found_by_asking(most: int, folder: Path):
    with scripted(Vllm(max_logprobs=most)) as server:
        client = teacher(server, folder, revision=None)
        able = await client.capabilities()
        assert await client.capabilities() is able
        await client.aclose()
    assert able.max_top_k == min(most, 128)
    assert able.tier == (Tier.TOPK if most else Tier.SAMPLED)
    assert (able.context_length, able.vocabulary, able.revision) == (MAX_MODEL_LEN - 1, VOCABULARY, "unversioned")


async def test_a_server_that_scores_ids_of_the_callers_choice_says_so(folder: Path):
    with scripted(Vllm(scores_ids=True)) as server:
        client = teacher(server, folder)
        assert (await client.capabilities()).tier == Tier.IDS
        await client.aclose()


async def test_nothing_is_left_over_when_the_top_k_holds_all_of_the_mass(folder: Path):
    def sure(rows: Rows) -> Rows:
        sure_row = {str(token): {"logprob": 0.0, "rank": 1, "decoded_token": ""} for token in (5,)}
        return [None, *rows[1:-1], sure_row]

    scores = await ask(Vllm(change=sure), folder, item(context=[1, 2], completion=[5]), Ask(top_k=1))
    np.testing.assert_allclose(scores.topk_tail, np.log(2.0**-23), rtol=1e-6)


# -------------------------------------------------------------------------------------------------- false answers


def at(index: int, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Callable[[Rows], Rows]:
    """Change one row."""
    return lambda rows: [change(row) if n == index else row for n, row in enumerate(rows)]


def with_logprob(value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Of the row's own token, which comes first."""
    return lambda row: {key: one | {"logprob": value} if n == 0 else one for n, (key, one) in enumerate(row.items())}


LIES: dict[str, Callable[[Rows], Rows]] = {
    "two rows are swapped": lambda rows: [*rows[:3], rows[4], rows[3], *rows[5:]],
    "the first null is missing": lambda rows: rows[1:],
    "the first null is missing and a row is added": lambda rows: [*rows[1:], rows[-1]],
    "the first is not null": at(0, lambda row: {"1": {"logprob": -1.0, "rank": 1}}),
    "a row is missing": lambda rows: rows[:-1],
    "there are no rows": lambda rows: [],
    "a row is null": at(3, lambda row: None),
    "a row's own token is missing": at(3, lambda row: {key: one for key, one in row.items() if key != "4"}),
    "a context's token is missing": at(1, lambda row: {"250": row["2"]}),
    "a rank is missing": at(3, lambda row: {key: one for key, one in row.items() if one["rank"] != 2}),
    "a rank is null": at(3, lambda row: {key: one | {"rank": None} for key, one in row.items()}),
    "a rank is twice there": at(3, lambda row: {key: one | {"rank": 1} for key, one in row.items()}),
    "an entry too many": at(3, lambda row: row | {"250": {"logprob": -9.0, "rank": 200}}),
    "the order is not by probability": at(
        3, lambda row: {key: one | {"rank": 4 - one["rank"]} if one["rank"] < 4 else one for key, one in row.items()}
    ),
    "a log-prob is above 0": at(3, with_logprob(0.5)),
    "more than all of the mass": at(3, lambda row: {key: one | {"logprob": -0.1} for key, one in row.items()}),
    "a key is no token": at(3, lambda row: row | {"the": {"logprob": -9.0, "rank": 9}}),
}


@pytest.mark.parametrize("lie", LIES)
async def test_rows_that_do_not_belong_to_the_tokens_are_an_alignment_error(lie: str, folder: Path):
    asked = item(context=[1, 2, 3], completion=[4, 5, 6])
    with pytest.raises(AlignmentError):
        await ask(Vllm(change=LIES[lie]), folder, asked, Ask(top_k=3))


@pytest.mark.parametrize("value", [-9999.0, float("nan"), float("-inf")])
async def test_a_log_prob_that_is_no_number_fails_its_item_and_no_other(value: float, folder: Path):
    vllm = Vllm(change=lambda rows: at(3, with_logprob(value))(rows) if len(rows) == 6 else rows)
    with scripted(vllm) as server:
        client = teacher(server, folder)
        items = [item("bad", context=[1, 2, 3], completion=[4, 5, 6]), item("good", context=[1], completion=[4, 5, 6])]
        bad, good = await client.score(items, Ask(top_k=2), None)
        await client.aclose()
    assert (bad.status, good.status) == (ScoreStatus.FAILED, ScoreStatus.OK)
    assert np.isnan(bad.sampled).all()
    assert np.isnan(bad.topk_logprobs).all()
    assert np.isfinite(good.sampled).all()


async def test_a_top_k_with_a_row_of_the_head_that_no_token_has_fails_its_item(folder: Path):
    rename = at(3, lambda row: {str(VOCABULARY) if one["rank"] == 1 else key: one for key, one in row.items()})
    scores = await ask(Vllm(change=rename), folder, item(context=[1, 2, 3], completion=[4]), Ask(top_k=2))
    assert scores.status == ScoreStatus.FAILED


ARRAYS: dict[str, Callable[[np.ndarray], Any]] = {
    "one row too few": lambda array: array[1:],
    "transposed": lambda array: array.T,
    "integers": lambda array: array.astype(np.int32),
    "an object": lambda array: np.array([None]),
}


@pytest.mark.parametrize("lie", ARRAYS)
async def test_an_array_that_is_not_the_one_asked_for_is_an_alignment_error(lie: str, folder: Path):
    asked = item(context=[1, 2], completion=[4, 5, 6], token_ids=[[1, 2], [3, 4], [5, 6]])
    vllm = Vllm(scores_ids=True, array=lambda array: array if len(array) == 1 else ARRAYS[lie](array))
    with pytest.raises(AlignmentError, match="prompt_token_id_logprobs"):
        await ask(vllm, folder, asked, Ask(num_ids=2))


# ------------------------------------------------------------------------------------------------------- refusals

OTHER = TeacherIdentity(name="big", revision="r2", tokenizer_fingerprint=fingerprint(TOKENIZER))
FOREIGN = TeacherIdentity(name="big", revision="r1", tokenizer_fingerprint="f")


@pytest.mark.parametrize(
    ("asked", "wanted", "expect", "kind", "message"),
    [
        (item(token_ids=[[1], [2], [3]]), Ask(num_ids=1), None, TeacherRefused, "VLLM_USE_V2_MODEL_RUNNER"),
        (item(), Ask(entropy=True), None, TeacherRefused, "no entropy"),
        (item(), Ask(top_k=1, draws=3), None, TeacherRefused, "no draws"),
        (item(), Ask(hidden=64), None, TeacherRefused, "no hidden"),
        (
            item(),
            Ask(top_k=6),
            None,
            TeacherRefused,
            "top_k is 6; big gives 5: start vLLM with a larger --max-logprobs",
        ),
        (item(completion=[1] * 62), Ask(), None, TeacherRefused, "item a: 64 tokens; big reads 63"),
        (item(completion=[VOCABULARY]), Ask(), None, TeacherRefused, "outside the 259 tokens"),
        (item(context=[VOCABULARY]), Ask(), None, TeacherRefused, "outside the 259 tokens"),
        (item(), Ask(), OTHER, TeacherRefused, "big r1 is not big r2"),
        (item(), Ask(), FOREIGN, TokenizerMismatch, "reads other tokens"),
    ],
)
async def test_what_it_cannot_be_asked_is_refused_before_it_is_sent(
    asked: ScoreItem, wanted: Ask, expect: TeacherIdentity | None, kind: type[PotstillError], message: str, folder: Path
):
    with scripted(Vllm()) as server:
        client = teacher(server, folder)
        await client.capabilities()
        sent = len(server.asked)
        with pytest.raises(kind, match=message):
            await client.score([asked], wanted, expect)
        assert len(server.asked) == sent
        await client.aclose()


async def test_a_tokenizer_that_differs_in_one_token_is_found_out_where_the_server_tells(folder: Path):
    swapped = {"1": "2", "2": "1"}

    class Other(Vllm):
        def __call__(self, path: str, asked: Any) -> Said:
            if path == "/tokenize":
                asked = asked | {"prompt": "".join(swapped.get(char, char) for char in asked["prompt"])}
            return super().__call__(path, asked)

    for has_tokenize in (True, False):
        with scripted(Other(has_tokenize=has_tokenize)) as server:
            client = teacher(server, folder)
            if has_tokenize:
                with pytest.raises(TokenizerMismatch, match="name a copy of its own tokenizer"):
                    await client.capabilities()
            else:
                assert (await client.capabilities()).tier == Tier.TOPK
            await client.aclose()


async def test_a_server_of_another_model_or_without_prompt_logprobs_is_refused(folder: Path):
    class Silent(Vllm):
        def complete(self, asked: Any) -> Said:
            status, body = super().complete(asked)
            if status == 200:
                body["choices"][0]["prompt_logprobs"] = None
            return status, body

    for server_like, model, message in ((Vllm(), "small", "named small"), (Silent(), "big", "no prompt_logprobs")):
        with scripted(server_like) as server:
            client = teacher(server, folder, model=model)
            with pytest.raises(TeacherRefused, match=message):
                await client.capabilities()
            await client.aclose()


async def test_a_prompt_that_the_server_changed_is_an_alignment_error(folder: Path):
    class Truncating(Vllm):
        def complete(self, asked: Any) -> Said:
            status, body = super().complete(asked)
            if status == 200 and len(asked["prompt"]) > 2:
                body["choices"][0]["prompt_token_ids"] = asked["prompt"][1:]
            return status, body

    with pytest.raises(AlignmentError, match="other tokens than it was sent"):
        await ask(Truncating(), folder, item(), Ask())


async def test_messages_that_the_chat_template_does_not_take_are_refused(folder: Path, tmp_path: Path):
    strict = save_tiny_model(tmp_path / "strict", seed=0)
    (strict / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(TeacherRefused, match="item a: the chat template does not take its messages"):
        await ask(Vllm(), strict, item(messages=(Message(role="user", content="hi"),)), Ask())


async def test_no_items_ask_nothing_of_the_prompt_route(folder: Path):
    with scripted(Vllm()) as server:
        client = teacher(server, folder)
        assert await client.score([], Ask(), None) == []
        await client.aclose()
