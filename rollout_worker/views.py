"""The two prompts of a completion: the one that the student reads, and the one that its teacher reads.

Renders, and decides nothing: who reads what is the config's, and how a privileged prompt is made is privilege.py's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from potstill.config_teachers import TeacherConfig
from potstill.privilege import teacher_messages
from potstill.tokenization import render
from potstill.types import IntArray, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Views:
    """In the student's tokens and its own chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, teacher: TeacherConfig) -> None:
        self._tokenizer = tokenizer
        self._teacher = teacher

    def own(self, prompt: Prompt) -> IntArray:
        """[P] what the student reads."""
        return np.array(render(self._tokenizer, prompt.messages), dtype=np.int32)

    def privileged(self, prompt: Prompt) -> IntArray | None:
        """[C] what the teacher reads in its place; None: the same."""
        messages = teacher_messages(prompt, self._teacher)
        return None if messages is None else np.array(render(self._tokenizer, messages), dtype=np.int32)

    def teachers(self, prompt: Prompt) -> IntArray:
        """[P or C] what the teacher reads."""
        privileged = self.privileged(prompt)
        return self.own(prompt) if privileged is None else privileged

    def messages(self, prompt: Prompt) -> tuple[Message, ...]:
        """What the teacher reads, before any template."""
        messages = teacher_messages(prompt, self._teacher)
        return prompt.messages if messages is None else messages
