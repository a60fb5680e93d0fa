"""What this service has and how much may be sent to it; and its models as OpenAI's clients list them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

import potstill
from orchestrator.service.bodies import MAX_BODY_BYTES
from orchestrator.service.prompt_files import MOST_LINE_BYTES, MOST_ROWS
from orchestrator.service.routes.asking import Reader, State
from orchestrator.service.routes.score import LONGEST_S, MOST_NUMBERS
from orchestrator.service.store.pages import Page
from potstill.methods import PRESETS

router = APIRouter(prefix="/v1", tags=["capabilities"])


@router.get("/capabilities", operation_id="get_capabilities")
def get_capabilities(who: Reader, state: State) -> dict[str, Any]:
    """What a run may name here, and how much may be sent."""
    teachers, _ = state.store.teachers.page(Page(limit=100))
    return {
        "object": "capabilities",
        "version": potstill.__version__,
        "models": state.catalog.models(),
        "datasets": state.catalog.datasets(),
        "teachers": [
            {"id": teacher.id, "kind": teacher.config["kind"], "tier": (teacher.probe or {}).get("tier")}
            for teacher in teachers
        ],
        "methods": [
            {"name": name, "tier": method.objective.tier.name, "phrase": method.phrase}
            for name, method in PRESETS.items()
        ],
        "limits": {
            "body_bytes": MAX_BODY_BYTES,
            "file_bytes": state.catalog.uploads.max_bytes,
            "file_rows": MOST_ROWS,
            "line_bytes": MOST_LINE_BYTES,
            "score_numbers": MOST_NUMBERS,
            "score_s": LONGEST_S,
        },
    }


@router.get("/models", operation_id="list_models")
def list_models(who: Reader, state: State) -> dict[str, Any]:
    """Every model that a run may name, as OpenAI's clients read it."""
    models = [{"id": name, "object": "model", "created": 0, "owned_by": "potstill"} for name in state.catalog.models()]
    return {"object": "list", "data": models}
