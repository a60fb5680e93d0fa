"""The timeline of a run, made from its spans alone: who worked and who waited when, as one self-contained page.

    <run>/spans/*.jsonl ──► window ──► bubble report (bubbles.py) and lanes ──► timeline.html, or JSON

The drawing is SVG made here; the page's only script shows a span's name under the pointer and widens the chart, and no
other script and no request is allowed on it. A page stays below 2 MB whatever the run's length: spans too short to see
are drawn together with the width that they have in all, and of many processes of one kind only some are shown. The page
says so where it happened; `bubbles` in JSON has all of them.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from orchestrator.bubbles import Account, Bubbles, Wait, bubbles, explained
from orchestrator.gantt import LANE_GAP_PX, ROW_PX, UNITS, Window, duration, lanes, steps, thinned, ticks
from orchestrator.pages import COLOURS, environment
from orchestrator.pieces import STAGES, group, role_of
from potstill.errors import ConfigError
from potstill.journal import write_atomically
from potstill.spans import FOLDER, Span, read_spans

LAST_S = 600.0  # shown of a run that is longer, unless asked: more and a step is narrower than a pixel
PER_ROLE = 16  # processes of one kind that are shown: more and nobody reads them
LONGEST_WAITS, TINY = 10, 0.005  # waits that are listed, and the share that one must have
SCRIPT = Path(__file__).parent / "templates" / "timeline.js"  # the page's policy names it by its hash


def read_bubbles(folder: Path, *, after: float | None = None, until: float | None = None) -> Bubbles:
    """The bubble report without the page. Arguments and errors as of write_timeline."""
    spans = _spans(folder)
    shown = window(spans, after=after, until=until)
    return bubbles(explained(group(spans)), start=shown.start, end=shown.end)


def write_timeline(folder: Path, page: Path, *, after: float | None = None, until: float | None = None) -> Bubbles:
    """Write the page, and return its bubble report.

    after, until  what is shown, in seconds since the run's first span; without both, its last ten minutes

    Raises ConfigError when the folder has no spans or none of them lies between the two.
    """
    spans = _spans(folder)
    shown = window(spans, after=after, until=until)
    by_process = explained(group(spans))
    report = bubbles(by_process, start=shown.start, end=shown.end)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(page, render(folder.resolve().name, shown, by_process, report).encode())
    return report


def window(spans: Sequence[Span], *, after: float | None, until: float | None) -> Window:
    """What is shown: as asked for, else the run's end."""
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    first = max(start, end - LAST_S) if after is None and until is None else start + (after or 0.0)
    last = end if until is None else min(end, start + until)
    if last <= first:
        raise ConfigError(
            f"nothing lies between --from and --to: the run has spans from 0 to {end - start:.1f} seconds"
        )
    return Window(start=first, end=last, run_start=start, run_end=end)


def render(run: str, shown: Window, by_process: Mapping[str, Sequence[Span]], report: Bubbles) -> str:
    """The page of the window, every text escaped."""
    script = SCRIPT.read_text()
    page = environment().get_template("timeline.html.j2")
    return page.render(
        run=run,
        colours=COLOURS,
        lane_gap_px=LANE_GAP_PX,
        script=Markup(script),  # noqa: S704  our own file
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **pictured(shown, by_process, report),
    )


def picture(folder: Path, *, after: float | None, until: float | None, whole_page: str) -> dict[str, Any] | None:
    """A run's folder as templates/timeline_body.html.j2 draws it; None while it holds no spans.

    Arguments as of write_timeline; `whole_page` is where a reader finds the whole run. Raises ConfigError for a window
    in which nothing lies.
    """
    spans = read_spans(folder)
    if not spans:
        return None
    shown = window(spans, after=after, until=until)
    by_process = explained(group(spans))
    return pictured(shown, by_process, bubbles(by_process, start=shown.start, end=shown.end), whole_page=whole_page)


def pictured(
    shown: Window, by_process: Mapping[str, Sequence[Span]], report: Bubbles, *, whole_page: str | None = None
) -> dict[str, Any]:
    """What templates/timeline_body.html.j2 reads."""
    accounts = [account for role in _roles(report.accounts).values() for account in _some(role)]
    drawn = lanes({account.process: by_process[account.process] for account in accounts}, shown)
    seen = {stage for account in accounts for stage, share in account.shares.items() if share}
    seen |= {mark.stage for lane in drawn for row in lane.rows for mark in row}  # also what is hidden in the shares
    return {
        "shown": shown,
        "report": report,
        "scope": scope(shown),
        "whole_page": whole_page,
        "left_out": left_out(report.accounts),
        "accounts": accounts,
        "stages": [stage for stage in (*STAGES, "idle") if stage in seen],
        "waits": longest_waits(accounts),
        "lanes": drawn,
        "steps": thinned(steps(itertools.chain(*by_process.values()), shown)),
        "ticks": ticks(shown),
        "height": drawn[-1].bottom,
        "row_px": ROW_PX,
        "units": UNITS,
        "duration": duration,
    }


def scope(shown: Window) -> str:
    """What part of the run the page is about."""
    length = duration(shown.run_end - shown.run_start)
    if shown.whole:
        return f"The whole run so far: {length}."
    first, last = duration(shown.start - shown.run_start), duration(shown.end - shown.run_start)
    return f"From {first} to {last} of {length}."


def left_out(accounts: Sequence[Account]) -> list[str]:
    """Which processes are not shown one by one."""
    return [
        f"{PER_ROLE} of {len(role)} processes “{name}” are shown, from the busiest to the idlest."
        for name, role in _roles(accounts).items()
        if len(role) > PER_ROLE
    ]


def longest_waits(accounts: Sequence[Account]) -> list[tuple[str, Wait]]:
    """The most time first. The loop's own waits are no bubbles: it has nothing else to do."""
    found = [(a.process, wait) for a in accounts if a.process != "loop" for wait in a.waits if wait.share >= TINY]
    return sorted(found, key=lambda row: row[1].seconds, reverse=True)[:LONGEST_WAITS]


def _spans(folder: Path) -> list[Span]:
    spans = read_spans(folder)
    if not spans:
        raise ConfigError(f"{folder / FOLDER} holds no spans: give the folder of a run, <runs>/<name>, that has begun")
    return spans


def _roles(accounts: Sequence[Account]) -> dict[str, list[Account]]:
    roles: dict[str, list[Account]] = defaultdict(list)
    for account in accounts:
        roles[role_of(account.process)].append(account)
    return roles


def _some(accounts: Sequence[Account]) -> list[Account]:
    """All of a few; of many, some from the busiest to the idlest, in the order that they had."""
    ranked = sorted(accounts, key=lambda account: account.still)
    last = len(ranked) - 1
    chosen = {ranked[round(place * last / (PER_ROLE - 1))].process for place in range(PER_ROLE)}
    return [account for account in accounts if account.process in chosen]
