"""Several runs side by side: where their settings differ, and what each has come to. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.pages import flatten
from orchestrator.service.dashboard.heading import Figure
from orchestrator.service.dashboard.rows import NOTHING

MOST = 6  # more lines of one figure nobody tells apart
_NAMES = frozenset({"name", "runs"})  # differ always, and say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A setting that is not the same in all runs; a value is "–" where a run's config has no such setting."""

    setting: str
    values: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One number of all runs."""

    label: str
    unit: str
    values: Sequence[str]


def differences(configs: Sequence[Mapping[str, Any]]) -> tuple[list[Difference], int]:
    """The settings that differ, in the order of the first config that has them, and how many are the same."""
    flat = [dict(flatten(config)) for config in configs]
    settings = [setting for setting in dict.fromkeys(name for one in flat for name in one) if setting not in _NAMES]
    rows = [Difference(setting=name, values=[one.get(name, NOTHING) for one in flat]) for name in settings]
    found = [row for row in rows if len(set(row.values)) > 1]
    return found, len(rows) - len(found)


def columns(found: Sequence[Sequence[Figure]]) -> list[Column]:
    """A column for every figure that one of the runs has, in the order in which they come."""
    by_label = [{figure.label: figure for figure in figures} for figures in found]
    first = {figure.label: figure for figures in reversed(found) for figure in figures}
    labels = dict.fromkeys(figure.label for figures in found for figure in figures)
    return [
        Column(
            label=label,
            unit=first[label].unit,
            values=[own[label].value if label in own else NOTHING for own in by_label],
        )
        for label in labels
    ]


def asked_for(values: Sequence[str]) -> list[str]:
    """The runs that a query names: ?runs=a,b and ?runs=a&runs=b are the same. Each once, at most MOST."""
    names = [name.strip() for value in values for name in value.split(",")]
    return list(dict.fromkeys(name for name in names if name))[:MOST]
