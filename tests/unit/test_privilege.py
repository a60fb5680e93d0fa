"""The privileged prompt is the student's with its last message rewritten, and never without its privilege."""

from __future__ import annotations

import pytest

from potstill.errors import ConfigError
from potstill.privilege import privileged_messages
from potstill.types import Message, Prompt

SYSTEM = Message(role="system", content="Be brief.")


def make_prompt(*, answer: str | None = "21", solution: str | None = None) -> Prompt:
    question = Message(role="user", content="12 + 9 = ?")
    return Prompt(
        id="train-7", index=7, messages=(SYSTEM, question), domain="sums", answer=answer, solution=solution, info={}
    )


def test_only_the_last_message_is_rewritten():
    found = privileged_messages(make_prompt(), "{prompt} Hint: {answer}")
    assert found == (SYSTEM, Message(role="user", content="12 + 9 = ? Hint: 21"))


def test_other_braces_are_left_alone():
    found = privileged_messages(make_prompt(), "{prompt} {x} {{answer}} {}")
    assert found[-1].content == "12 + 9 = ? {x} {21} {}"


def test_braces_in_what_is_filled_in_are_not_filled_in_again():
    assert privileged_messages(make_prompt(answer="{solution}"), "{answer}")[-1].content == "{solution}"


@pytest.mark.parametrize("name", ["answer", "solution"])
def test_a_privilege_that_the_prompt_does_not_have_is_an_error_that_names_both(name: str):
    with pytest.raises(ConfigError, match=rf"wants {{{name}}}, which prompt train-7 does not have"):
        privileged_messages(make_prompt(answer=None), f"{{prompt}} {{{name}}}")
