"""The dashboard: HTML pages beside the API, rendered on the server, over the same store and under the same rules.

It changes nothing by itself: what a page's buttons do goes through /v1, as a browser's session, with JSON. It asks
nothing of any other host, and its pages run no script and no style that is not a file of static/.
"""

from __future__ import annotations

from fastapi import FastAPI

from orchestrator.service.dashboard import assets, pages, policy, signing_in


def install(app: FastAPI) -> None:
    """Mount the pages at /, their files at /static, and the headers that every answer of the service gets."""
    app.state.attempts = signing_in.Attempts()
    app.include_router(signing_in.router)
    app.include_router(pages.router)
    app.mount("/static", assets.Files())
    app.add_middleware(policy.Policy)
