"""What an endpoint repeats of a question is taken out of its complaint, and what one can act on is left."""

from __future__ import annotations

import json

import pytest

from potstill.calling.quoting import without_quotes

SECRET = "The answer is\n21, because 12 + 9 is 21."
BODY = json.dumps({"model": "some-org/a-model-with-a-long-name", "messages": [{"role": "user", "content": SECRET}]})


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (f"cannot read {SECRET!r} at all", "cannot read 'The answer is\\n…' at all"),
        (f"{SECRET}{SECRET}", "……"),
        ("model some-org/a-model-with-a-long-name does not exist", None),
        ("max_tokens is too large: 12 + 9", None),
        ("", None),
    ],
)
def test_long_quotations_go_and_names_stay(said: str, left: str | None):
    assert without_quotes(said, BODY.encode()) == (said if left is None else left)


def test_token_ids_are_quotations_too():
    body = json.dumps({"prompt": list(range(100, 120))}).encode()
    assert without_quotes(f"too long: {list(range(104, 112))}", body) == "too long: […]"


@pytest.mark.parametrize("sent", [None, b"", b"\x00\xffno JSON", b"[]"])
def test_what_was_not_said_in_json_cannot_be_quoted(sent: bytes | None):
    said = "a complaint of more than twenty-four characters"
    assert without_quotes(said, sent) == said
