"""How a page is answered: rendered for whoever looks at it, never kept by a browser, and a refusal as a sentence.

Whoever has not signed in is sent to do that. A link on another site comes without the session's cookie, which is
strict: such a request is answered with a page that asks once more by itself, as a page of this site.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.routing import APIRoute

from orchestrator.service.authentication import COOKIE
from orchestrator.service.dashboard import assets
from orchestrator.service.dashboard.templating import templates
from orchestrator.service.principals import Principal, Scope
from orchestrator.service.routes.asking import Reader, State
from orchestrator.service.state import ServiceState
from potstill.errors import ConfigError, ServiceError

_TITLES = {
    400: "That address is not right",
    401: "Please sign in",
    403: "Not with this key",
    404: "Nothing is here",
    429: "Too often",
    503: "Not now",
}


class PageRoute(APIRoute):
    """A route whose refusals are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def answer_or_say(request: Request) -> Response:
            if request.method != "GET":  # a script asks, and reads the API's own errors
                return await answer(request)
            try:
                return await answer(request)
            except RequestValidationError:
                return refused(request, ServiceError("a part of this address is not what the page reads", 400, "bad"))
            except ConfigError as error:
                return refused(request, ServiceError(str(error), 400, "bad"))
            except ServiceError as error:
                return refused(request, error)

        return answer_or_say


class View:
    """What a page's route is given: who looks, at what time, and how an answer is made."""

    def __init__(self, request: Request, who: Reader, state: State) -> None:
        self.request = request
        self.who: Principal = who
        self.state: ServiceState = state
        self.now = time.time()

    @property
    def may_write(self) -> bool:
        return self.who.may(Scope.RUNS_WRITE)

    def page(self, template: str, **content: Any) -> HTMLResponse:
        return page(self.request, template, who=self.who, now=self.now, **content)


Viewing = Annotated[View, Depends(View)]


def page(request: Request, template: str, *, who: Principal | None, status: int = 200, **content: Any) -> HTMLResponse:
    """Render it. `who`: None where nobody has signed in."""
    text = templates().get_template(template).render(who=who, path=request.url.path, asset=assets.url, **content)
    return HTMLResponse(text, status_code=status, headers={"Cache-Control": "no-store"})


def refused(request: Request, error: ServiceError) -> Response:
    """What is shown instead of the page that was asked for."""
    status = error.status or 500
    if status == 401:
        return _to_the_door(request)
    title = _TITLES.get(status, "That did not work")
    said = {"title": title, "message": sentence(str(error)), "request_id": request.state.request_id}
    return page(request, "refusal.html.j2", who=request.state.principal, status=status, **said)


def sentence(text: str) -> str:
    """A message of the API as a sentence. Example: sentence("there is no such run") == "There is no such run."."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def here(request: Request) -> str:
    """The page that was asked for, as a local address."""
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def _to_the_door(request: Request) -> Response:
    door = "/login?" + urlencode({"next": here(request)})
    if request.headers.get("hx-request") == "true":  # a page that was open when its session ended
        return Response(status_code=401, headers={"HX-Redirect": door})
    from_elsewhere = request.headers.get("sec-fetch-site") == "cross-site"
    if from_elsewhere and COOKIE not in request.cookies:
        return page(request, "again.html.j2", who=None, here=here(request))
    return RedirectResponse(door, status_code=303, headers={"Cache-Control": "no-store"})
