"""The privileged prompt: what a teacher may read and the student may not."""

from __future__ import annotations

import re

from potstill.errors import ConfigError
from potstill.types import Message, Prompt


def privileged_messages(prompt: Prompt, template: str) -> tuple[Message, ...]:
    """The prompt's conversation with its last message rewritten by `template`.

    {prompt}, {answer} and {solution} are replaced; any other brace is left as it is. Raises ConfigError when the
    template asks for what this prompt does not have: a teacher without its privilege would teach nothing.
    """
    *before, last = prompt.messages
    known = {"prompt": last.content, "answer": prompt.answer, "solution": prompt.solution}

    def value(match: re.Match[str]) -> str:
        found = known[match[1]]
        if found is None:
            raise ConfigError(f"teacher.privileged_template wants {match[0]}, which prompt {prompt.id} does not have")
        return found

    content = re.sub(r"\{(prompt|answer|solution)\}", value, template)
    return (*before, Message(role=last.role, content=content))
