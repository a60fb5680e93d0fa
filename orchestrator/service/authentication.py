"""Who sends a request: the bearer of a key, a browser's session, or a run's present job. Asked before a body is read.

Everything below /v1 needs one of them; what is outside (probes, the dashboard's pages) says for itself what it needs.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from orchestrator.service.keys import Signer
from orchestrator.service.principals import Principal
from orchestrator.service.store import Store
from potstill.errors import ServiceError

COOKIE = "potstill_session"
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_REPORT = re.compile(r"/v1/runs/([^/]+)/events")


class Authentication:
    """Over one store. Its methods ask the database: call them by way of waits.py."""

    def __init__(self, store: Store, signer: Signer) -> None:
        self.store = store
        self._signer = signer

    def of_request(self, method: str, path: str, headers: Headers) -> Principal | None:
        """Who asks; None where nobody need be known, and is not. Raises ServiceError: 401, or 403 without an Origin."""
        report = _REPORT.fullmatch(path)
        if report is not None and method == "POST":
            self._check_job(report[1], headers)
            return None
        session = cookie_parser(headers.get("cookie", "")).get(COOKIE)
        if not path.startswith("/v1/") and path != "/v1":
            return None if session is None else self.store.keys.session(session)
        if "authorization" in headers or session is None:
            found, code = self.store.keys.bearer(_bearer(headers)), "invalid_key"
        else:
            if method not in SAFE and "origin" not in headers:
                raise ServiceError("a browser's session acts with an Origin only; scripts send a key", 403, "no_origin")
            found, code = self.store.keys.session(session), "session_ended"
        if found is None:
            raise ServiceError("this key is not known, has expired or was revoked", 401, code)
        return found

    def _check_job(self, run_id: str, headers: Headers) -> None:
        """Only the present job of a run reports about it, by the token that it was launched with."""
        job = self.store.runs.job(run_id)
        # Whether the run exists is not a stranger's to know: the token is compared all the same.
        if not self._signer.matches(job or "", _bearer(headers)) or job is None:
            raise ServiceError("this is not the token of the run's present job", 401, "invalid_token")


def _bearer(headers: Headers) -> str:
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise ServiceError("send your key as `Authorization: Bearer …`", 401, "missing_key")
    return secret.strip()
