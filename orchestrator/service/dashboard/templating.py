"""Where the dashboard's templates are: its own, and those that reports and timelines are made of."""

from __future__ import annotations

import functools

from jinja2 import ChoiceLoader, Environment, PackageLoader

from orchestrator.pages import environment


@functools.cache
def templates() -> Environment:
    """Every text is escaped and made visible, and a name that a page forgot is an error (orchestrator/pages.py)."""
    return environment(ChoiceLoader([PackageLoader("orchestrator.service.dashboard"), PackageLoader("orchestrator")]))
