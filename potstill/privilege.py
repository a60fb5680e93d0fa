"""The privileged prompt: what a teacher may read and the student may not, and how much of it is left at a step."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from potstill.config_teachers import Reading, TeacherConfig
from potstill.errors import ConfigError
from potstill.fading import faded, share
from potstill.types import Message, Prompt

PRIVILEGES = ("answer", "solution", "advice")  # fields of Prompt that a template may show; they fade


def teacher_messages(prompt: Prompt, teacher: TeacherConfig) -> tuple[Message, ...] | None:
    """What `teacher` reads in place of the student's prompt; None: it has no prompt of its own.

    With fade_steps the privileged text becomes shorter with the prompt's step; when nothing of it is left, it is the
    student's prompt. A held-out prompt belongs to no step and keeps all. Raises ConfigError as below.
    """
    if not isinstance(teacher, Reading) or teacher.privileged_template is None:
        return None
    template = teacher.privileged_template
    if teacher.fade_steps is None or prompt.step is None:
        return privileged_messages(prompt, template)
    kept = share(prompt.step, decay_steps=teacher.fade_steps)
    left: dict[str, Any] = {name: getattr(prompt, name) for name in PRIVILEGES}
    left |= {name: faded(text, share=kept) for name, text in left.items() if text is not None}
    messages = privileged_messages(dataclasses.replace(prompt, **left), template)
    return messages if any(left[name] for name in shown(template)) else prompt.messages


def privileged_messages(
    prompt: Prompt, template: str, setting: str = "teacher.privileged_template"
) -> tuple[Message, ...]:
    """The prompt's conversation with its last message rewritten by `template`, which stands in `setting`.

    {prompt}, {answer}, {solution} and {advice} are replaced; any other brace is left as it is. Raises ConfigError when
    the template asks for what this prompt does not have: a teacher without its privilege would teach nothing.
    """
    *before, last = prompt.messages
    known = {"prompt": last.content, **{name: getattr(prompt, name) for name in PRIVILEGES}}

    def value(match: re.Match[str]) -> str:
        found = known[match[1]]
        if found is None:
            raise ConfigError(f"{setting} wants {match[0]}, which prompt {prompt.id} does not have")
        return str(found)

    content = re.sub(rf"\{{({'|'.join(known)})\}}", value, template)
    return (*before, Message(role=last.role, content=content))


def shown(template: str) -> set[str]:
    """The privileges that a template shows."""
    return set(re.findall(rf"\{{({'|'.join(PRIVILEGES)})\}}", template))
