"""The objective as an algebra, and the methods that are named points in it. A method is a table, not a trainer.

    L = Agg_t[ gate_t · ratio_t · divergence_t over a support ]        (DESIGN §4, algorithms §14)

`potstill methods` prints PRESETS. What each choice computes is in learner/divergences.py and learner/objective.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A table of the config: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Tier(IntEnum):
    """What a teacher can be asked for. Each tier can do what the ones below it can."""

    TEXT = 0  # writes text only
    SAMPLED = 1  # log-probs of given tokens
    TOPK = 2  # its own top-k
    IDS = 3  # log-probs of ids that the caller chose
    FULL = 4  # hidden states or all logits


class Objective(Section):
    """What is minimised, position by position, and how positions are added up."""

    support: Literal["sampled", "student_topk", "teacher_topk", "full"]
    """Outcomes over which the divergence is taken: the sampled token, a top-k of either side, or the vocabulary."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "nll"]
    """reverse_kl seeks a mode, forward_kl covers, jsd lies between; nll is the likelihood of the text (supervised)."""
    k: Annotated[int, Field(ge=1, le=128)] | None = None
    """Entries of a top-k support. Too small: the tail bucket holds what matters."""
    rest: Literal["tail"] = "tail"
    """Mass outside a top-k becomes one more outcome, so that the divergence stays a divergence."""
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of jsd: m = beta·teacher + (1 - beta)·student. Near 0 forward KL, near 1 reverse KL."""
    pointwise_clip: Annotated[float, Field(gt=0)] | None = None
    """Cap on each vocabulary entry's term of a forward KL (OPSD). Too small: only frequent tokens still teach."""
    ratio_cap: Annotated[float, Field(gt=0)] | None = None
    """Cap on the importance ratio student now / student at sampling (sampled support). Too small: biased."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """token_mean: long completions weigh more; sequence_mean: each completion weighs the same."""

    @model_validator(mode="after")
    def _consistent(self) -> Objective:
        if (self.k is None) != (self.support in {"sampled", "full"}):
            raise ValueError(f'objective.k belongs to a top-k support; support is "{self.support}" and k is {self.k}')
        if (self.beta is None) != (self.divergence != "jsd"):
            raise ValueError(f'objective.beta belongs to "jsd"; divergence is "{self.divergence}", beta {self.beta}')
        if self.pointwise_clip is not None and self.divergence != "forward_kl":
            raise ValueError('objective.pointwise_clip belongs to divergence "forward_kl"')
        if self.support == "sampled" and self.divergence not in {"reverse_kl", "nll"}:
            raise ValueError('support "sampled" estimates "reverse_kl" or "nll"; another divergence needs a top-k')
        if self.divergence == "nll" and self.support != "sampled":
            raise ValueError('divergence "nll" is the likelihood of the written tokens: support is "sampled"')
        if self.ratio_cap is not None and (self.support, self.divergence) != ("sampled", "reverse_kl"):
            raise ValueError('objective.ratio_cap belongs to support "sampled" with "reverse_kl"')
        return self

    @property
    def tier(self) -> Tier:
        """The least a teacher behind HTTP must offer."""
        if self.divergence == "nll":
            return Tier.TEXT
        tiers = {"sampled": Tier.SAMPLED, "teacher_topk": Tier.TOPK, "student_topk": Tier.IDS, "full": Tier.FULL}
        return tiers[self.support]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A preset: its choices, one phrase for the list, and where it comes from."""

    objective: Objective
    phrase: str
    source: str


PRESETS: dict[str, Method] = {
    "opd": Method(
        objective=Objective(support="student_topk", divergence="reverse_kl", k=16),
        phrase="on-policy distillation, exact reverse KL over the student's top-k and a tail bucket",
        source="arXiv 2306.13649 with the top-k of arXiv 2601.20802",
    ),
    "opd_sampled": Method(
        objective=Objective(support="sampled", divergence="reverse_kl", ratio_cap=5.0),
        phrase="on-policy distillation, sampled-token policy gradient; the least a teacher must offer",
        source="Thinking Machines 2025, with the advantage under the current student (arXiv 2606.24143)",
    ),
    "gkd": Method(
        objective=Objective(support="teacher_topk", divergence="jsd", k=16, beta=0.5),
        phrase="generalised JSD over the teacher's top-k and a tail bucket",
        source="arXiv 2306.13649",
    ),
    "opsd": Method(
        objective=Objective(support="full", divergence="forward_kl", pointwise_clip=0.05, aggregation="sequence_mean"),
        phrase="self-distillation from a privileged prompt, forward KL over the vocabulary with a pointwise clip",
        source="arXiv 2601.18734 v3",
    ),
    "opsd_reverse": Method(
        objective=Objective(support="full", divergence="reverse_kl"),
        phrase="self-distillation from a privileged prompt, reverse KL over the vocabulary",
        source="arXiv 2601.18734 v1, its reverse-KL ablation",
    ),
    "sft": Method(
        objective=Objective(support="sampled", divergence="nll"),
        phrase="likelihood of reference or teacher text; the off-policy baseline",
        source="sequence-level knowledge distillation, arXiv 1606.07947",
    ),
}
