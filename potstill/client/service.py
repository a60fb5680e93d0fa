"""The calls about the service itself: what it can do, which models it has, whether it is ready."""

from __future__ import annotations

from typing import Any

from potstill.client.answers import as_object
from potstill.client.resources import Page
from potstill.client.steps import Call


def get_capabilities() -> Call[dict[str, Any]]:
    """Methods, limits and versions."""
    return Call(method="GET", path="/v1/capabilities", reads=as_object)


def list_models() -> Call[Page[dict[str, Any]]]:
    """Models that a run may name."""
    return Call(method="GET", path="/v1/models", reads=as_object)


def version() -> Call[dict[str, Any]]:
    """The service's version. Needs no key."""
    return Call(method="GET", path="/version", reads=as_object)


def ready() -> Call[dict[str, Any]]:
    """Whether the service can work; Refused (503) with the reason while it cannot. Needs no key."""
    return Call(method="GET", path="/readyz", reads=as_object)
