"""The dashboard's files: style sheets, scripts and the libraries of static/vendor, each under a name with its digest.

A page asks for `/static/name?v=digest`, which a browser keeps for good; without the digest it asks again each time.
What reports and timelines have inside them is served here too: house.css, rendered once from their templates, and the
timeline's script.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from orchestrator import gantt, heatmap, pieces, timeline
from orchestrator.pages import COLOURS
from orchestrator.service.dashboard.templating import templates

FOLDER = Path(__file__).parent / "static"
_FOR_GOOD = "public, max-age=31536000, immutable"


class Files(StaticFiles):
    """/static, with what is shared."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER)

    async def get_response(self, path: str, scope: Scope) -> Response:
        if path in _SHARED:
            media_type, content = _SHARED[path]
            response = Response(content(), media_type=media_type)
        else:
            response = await super().get_response(path, scope)
        asked = scope["query_string"].decode("ascii", "replace")
        response.headers["Cache-Control"] = _FOR_GOOD if asked.startswith("v=") else "no-cache"
        return response


@functools.cache
def house_css() -> bytes:
    sheet = templates().get_template("house_sheet.css.j2")
    stages = [*pieces.STAGES, "idle"]
    text = sheet.render(
        colours=COLOURS, legend=heatmap.legend(), stages=stages, row_px=gantt.ROW_PX, lane_gap_px=gantt.LANE_GAP_PX
    )
    return text.encode()


def timeline_js() -> bytes:
    return timeline.SCRIPT.read_bytes()


_SHARED: Mapping[str, tuple[str, Callable[[], bytes]]] = {
    "house.css": ("text/css", house_css),
    "timeline.js": ("text/javascript", timeline_js),
}


@functools.cache
def url(name: str) -> str:
    """Where a page finds a file. Example: url("dashboard.css") == "/static/dashboard.css?v=1f5e0c2ab9d1"."""
    content = _SHARED[name][1]() if name in _SHARED else (FOLDER / name).read_bytes()
    return f"/static/{name}?v={hashlib.sha256(content).hexdigest()[:12]}"
