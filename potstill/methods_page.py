"""docs/methods.md, made from the presets: `python -m potstill.methods_page > docs/methods.md`.

What a method computes is read off its objective, so the page cannot say another number than the code. Refuses to
recommend a method that its reader's teacher could not serve.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from potstill.algebra.judges import Verifier
from potstill.algebra.losses import Likelihood, PolicyGradient, Preference
from potstill.algebra.objective import Objective, Term, Tier
from potstill.methods import PRESETS, classic, crosstokenizer, multiple, offline, onpolicy, rewarded, selfdistilled
from potstill.methods.method import Method
from potstill.section import Ramp

HEAD = """# Methods

A method is a table of choices in one algebra, and a preset is such a table with a name:

    L = Σ over terms  weight · Agg_t[ gates_t · correction_t · loss_t over a support ]

`method = "opd"` in a config takes a preset, an `[objective]` table changes its choices ([config.md](config.md)), and
`potstill methods NAME` prints what this page says of one. A preset not here is [twenty lines](add_a_method.md).

**How to read the tables.** *Computes* uses the config's own words: on whose text, weight · loss (its numbers) over a
support → target × gates and correction, and how tokens are added up; a term that reads any text has no "on".
*Needs* begins with the least that a teacher must offer: `text` < `sampled` (log-probs of given tokens) < `topk` (its
own) < `ids` (of the student's choice) < `full` (all logits). A teacher in the learner (`kind = "local"` or `"self"`)
offers `full`, and so does potstill's own server where its model's folder is named (`teacher.model` or `teacher.head`);
else it offers `ids`. *Settings* are the paper's run, to compare with; none is applied.
"""

CHOICES: tuple[tuple[str, Tier, tuple[str, ...], str], ...] = (
    ("a model that fits beside the student", Tier.FULL, ("opd_full", "gkd", "distillm"), "the least noise"),
    ("the same, far stronger than the student", Tier.FULL, ("taid", "veto", "distillm_forward"), "a nearer target"),
    ("several such models", Tier.FULL, ("mopd", "multi_teacher"), "by domain, or as one"),
    ("a server that scores ids of your choice", Tier.IDS, ("opd", "early_stop"), "the default"),
    ("a server that sends its own top-k", Tier.TOPK, ("lsm", "gkd_topk", "eopd"), "set `top_p` for `lsm`"),
    ("a server that scores a given token", Tier.SAMPLED, ("opd_sampled", "power_opd", "iw_opd"), "noisier: more text"),
    ("the same, and a verifier", Tier.SAMPLED, ("kdrl",), "a teacher that is better but not right"),
    ("one that does, with another tokenizer", Tier.SAMPLED, ("cross_tokenizer",), "pieces of text, not tokens"),
    ("a teacher that only writes text", Tier.TEXT, ("gad",), "after `sft` on the same text"),
    ("answers in the data, whoever wrote them", Tier.TEXT, ("sft",), "first stage and control"),
    ("a verifier and no teacher", Tier.TEXT, ("grpo",), "the control of every reward"),
    ("no teacher, but solutions or hints", Tier.FULL, ("opsd", "sdft", "opcd"), '`kind = "self"`, a privileged prompt'),
    ("the same, and a verifier", Tier.FULL, ("rlsd", "rl_opsd", "skill_sd"), "the reward says which way"),
    ("no teacher and no hints, only text", Tier.FULL, ("ps_kd",), 'softer than `sft`; `kind = "self"`, `"ema"`'),
)
"""What one has, the tier that this is, methods for it, a remark."""

ACCESS = ("text, or no teacher", "some log-probs", "all logits", "self")

FAMILIES: tuple[tuple[str | None, Mapping[str, Method]], ...] = (
    (onpolicy.__doc__, onpolicy.ON_POLICY),
    (classic.__doc__, classic.CLASSIC),
    (selfdistilled.__doc__, selfdistilled.SELF_DISTILLED),
    (rewarded.__doc__, rewarded.REWARDED),
    (multiple.__doc__, multiple.MULTIPLE),
    (crosstokenizer.__doc__, crosstokenizer.CROSS_TOKENIZER),
    (offline.__doc__, offline.OFFLINE),
)
"""A file's docstring heads its methods."""

_TEXTS = {
    "all": "",
    "student": "on the student's text: ",
    "privileged": "on the same under the privileged prompt: ",
    "others": "on others' text: ",
}


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([HEAD, *_choosing(), *_grid(), *(line for family in FAMILIES for line in _family(*family))])


def computes(objective: Objective) -> str:
    """The objective in a line, in the config's own words.

    >>> from potstill.methods.method import objective
    >>> computes(objective(support="full", loss="jsd", over="student"))
    "on the student's text: jsd (beta 0.5) over full; by token_mean"
    """
    sums = {_part(term.aggregation) for term in objective.terms.values()}
    by_text: dict[str, list[str]] = {}
    for term in objective.terms.values():
        own = "" if len(sums) == 1 else f" by {_part(term.aggregation)}"
        by_text.setdefault(_TEXTS[term.over], []).append(_term(term) + own)
    shared = [f"by {added}" for added in sums] if len(sums) == 1 else []
    shared += [] if isinstance(objective.judge, Verifier) else [f"judged by {_part(objective.judge)}"]
    return "; ".join([text + " + ".join(terms) for text, terms in by_text.items()] + shared)


def access(method: Method) -> str:
    """The survey's second axis: which column of the grid."""
    if method.context == "privileged" or method.settings.get("teacher.kind") == "self":
        return "self"
    tier = method.objective.tier
    return ACCESS[0] if tier is Tier.TEXT else ACCESS[2] if tier is Tier.FULL else ACCESS[1]


def _choosing() -> Iterator[str]:
    yield "## How to choose\n\n| you have | take | because |\n|---|---|---|"
    for having, _, names, remark in CHOICES:
        yield f"| {having} | {_names(names)} | {remark} |"
    yield (
        "\nA teacher of a higher tier can do what the lower ones can. Run the control beside the method: `sft` on as\n"
        "many tokens, or `grpo` where there is a verifier.\n"
    )


def _grid() -> Iterator[str]:
    """Signal × teacher access × granularity, of the survey's first version."""
    yield (
        "## All of them, by signal, teacher access and granularity\n\n"
        "The axes are those of *A Survey of On-Policy Distillation for LLMs*, "
        f"{_linked('arXiv 2604.00626')}; where a method lies is this project's reading.\n\n"
        f"| signal, granularity | {' | '.join(ACCESS)} |\n|---{'|---' * len(ACCESS)}|"
    )
    for kind in dict.fromkeys((method.signal, method.granularity) for method in PRESETS.values()):
        cells = [
            _names(name for name, m in PRESETS.items() if (m.signal, m.granularity) == kind and access(m) == column)
            for column in ACCESS
        ]
        yield f"| {', '.join(kind)} | {' | '.join(cells)} |"
    yield ""


def _family(doc: str | None, presets: Mapping[str, Method]) -> Iterator[str]:
    title, _, rest = (doc or "").partition("\n")
    yield f"## {title.rstrip('.')}\n\n{' '.join(rest.split())}\n".replace("\n\n\n", "\n")
    yield "| preset | computes | needs | good at | trap | source and settings |\n|---|---|---|---|---|---|"
    for name, method in presets.items():
        needs = " · ".join(f"{what}: {how}" for what, how in method.needs.items())
        source = _linked(method.source).rstrip(".") + "."
        source += f" Settings: {_settings(method.settings)}." if method.settings else ""
        cells = [f"`{name}`: {method.phrase}", computes(method.objective), needs, method.good_at, method.trap, source]
        yield f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |"
    yield ""


def _term(term: Term) -> str:
    weight = "" if term.weight == 1 else f"{_value(term.weight)} · "
    over = "" if isinstance(term.loss, Likelihood | Preference) else f" over {_part(term.support)}"
    target = "" if term.target is None else f" → {_part(term.target)}"
    against = " against the reference" if term.against == "reference" else ""
    correction = [] if term.correction.kind == "ignored" else [term.correction]
    factors = "".join(f" × {_part(factor)}" for factor in (*term.gates, *correction))
    return f"{weight}{_part(term.loss)}{over}{target}{against}{factors}"


def _part(part: BaseModel) -> str:
    """A choice with what it says: all that was changed, and defaults that are numbers or rests of a top-k."""
    said = []
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        default = field.get_default(call_default_factory=True)
        unused = isinstance(part, PolicyGradient) and name == "exponent" and part.score != "power"
        neutral = value == default and (isinstance(value, bool | str | None) or value in (0, 1)) and name != "rest"
        if name != "kind" and not unused and not neutral:
            said.append(value if name == "rest" else f"{name} {_value(value)}")
    kind: str = part.kind  # type: ignore[attr-defined]
    return f"{kind} ({', '.join(said)})" if said else kind


def _value(value: Any) -> str:
    if isinstance(value, Ramp):
        until = "the last" if value.to_step is None else value.to_step
        return f"({value.start:g} → {value.end:g} from step {value.from_step} to {until})"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _settings(settings: Mapping[str, Any]) -> str:
    """As a config would write them."""
    written = {key: _value(value) if isinstance(value, float) else json.dumps(value) for key, value in settings.items()}
    return ", ".join(f"`{key} = {value}`" for key, value in written.items())


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _linked(text: str) -> str:
    """The text with arXiv ids as links."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"arXiv [\1](https://arxiv.org/abs/\1)", text)


if __name__ == "__main__":
    sys.stdout.write(page())
