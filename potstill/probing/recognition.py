"""Recognition: which kind of teacher answers at a URL, by the routes that it has. It sends no prompt.

/v1/capabilities                            server
/version, or /v1/models of nobody but vLLM  vllm
neither                                     openai
"""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from potstill.calling.outbound import Answer, Endpoint
from potstill.teachers.foreign import SMALL_ANSWER_BYTES

Kind = Literal["server", "vllm", "openai"]
Shape = TypeVar("Shape")


class _Version(BaseModel):
    version: str


class _Card(BaseModel):
    owned_by: str = ""


class _Cards(BaseModel):
    data: list[_Card]


_VERSION, _CARDS = TypeAdapter(_Version), TypeAdapter(_Cards)


async def kind_of(endpoint: Endpoint) -> Kind:
    """Ask the endpoint, whose URL is without /v1.

    Raises TeacherRefused when it wants another key, TeacherUnavailable when it is away.
    """
    answer = await _get(endpoint, "/v1/capabilities")
    if answer.status in {401, 403}:
        raise endpoint.refusal(answer)
    if answer.status == 200:
        return "server"
    if _read(_VERSION, await _get(endpoint, "/version")) is not None:
        return "vllm"
    models = _read(_CARDS, await _get(endpoint, "/v1/models"))
    return "vllm" if models is not None and {card.owned_by for card in models.data} == {"vllm"} else "openai"


async def _get(endpoint: Endpoint, path: str) -> Answer:
    return await endpoint.call("GET", path, limit_bytes=SMALL_ANSWER_BYTES)


def _read(shape: TypeAdapter[Shape], answer: Answer) -> Shape | None:
    """The answer in the shape that it should have; None when it has another."""
    if answer.status != 200:
        return None
    try:
        return shape.validate_json(answer.content)
    except ValidationError:
        return None
