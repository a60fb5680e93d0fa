"""One training sample as the run will see it: rendered, decoded, with its loss mask. Catches most mistakes in data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from potstill.config import RunConfig
from potstill.environments import open_environment
from potstill.privilege import privileged_messages
from potstill.tokenization import load_tokenizer, render


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """`completion` is empty where the student will write it; `trained` is the part the loss will see."""

    prompt: str
    num_prompt_tokens: int
    teacher_prompt: str | None
    completion: str | None
    trained: str
    answer: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        lines = [f"sample ({self.num_prompt_tokens} prompt tokens; [[...]] is what the loss sees):", self.prompt]
        lines.append(f"[[{self.completion if self.completion is not None else 'whatever the student writes'}]]")
        if self.teacher_prompt is not None:
            lines += ["the teacher reads instead:", self.teacher_prompt]
        lines.append(f"answer for the verifier: {self.answer if self.answer is not None else 'none'}")
        return "\n".join(lines)


def decoded_sample(config: RunConfig) -> Sample:
    """The run's first training prompt. Raises ConfigError when tokenizer or data are missing."""
    prompt = open_environment(config.data).train(0)
    tokenizer = load_tokenizer(config.student.model)
    ids = render(tokenizer, prompt.messages)
    template = getattr(config.teacher, "privileged_template", None)
    privileged = None
    if template is not None:
        privileged = tokenizer.decode(render(tokenizer, privileged_messages(prompt, template)))
    return Sample(
        prompt=tokenizer.decode(ids),
        num_prompt_tokens=len(ids),
        teacher_prompt=privileged,
        completion=prompt.solution if config.rollout.source == "reference" else None,
        trained="every token of the completion, the end token included",
        answer=prompt.answer,
    )
