"""What the pages of a run have in common: colours, and templates that escape every text.

The style sheet itself is templates/house.css.j2.
"""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

# The light values of the page's variables; each value stands for one variable, so none may occur twice.
COLOURS = {
    "--ink": "#1d1d1b",
    "--muted": "#6b6a65",
    "--rule": "#dedad2",
    "--student": "#1f5f8b",
    "--student-pale": "#a8c4d8",
    "--control": "#b5641d",
    "--control-pale": "#e2c1a2",
}


def environment() -> Environment:
    """Where the templates are; a name that a page forgot is an error, not an empty place."""
    return Environment(
        loader=PackageLoader("orchestrator"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
