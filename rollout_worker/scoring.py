"""What a teacher is asked of a step's rollouts, and its answers beside them.

Only text that a term reads scores of is sent. Draws that the student made beside its text are asked as ids of the
caller's choice, each once a position. A token that a teacher of other tokens could not be aligned with is no
loss token; everything else that is missing stays NaN, with a status, and is counted by whoever builds the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from potstill.algebra.gates import Confidence, EntropyGap, TeacherEntropyAbove
from potstill.algebra.objective import Objective, Term, Tier
from potstill.algebra.supports import StudentTopK, TeacherTopK
from potstill.teachers.chosen_ids import among, filled, width_of
from potstill.teachers.retokenised import masked
from potstill.teachers.scorer import Scorer
from potstill.types import IntArray, Message, Rollout, ScoredRollout, TeacherIdentity, TeacherScores
from potstill.wire import Ask, ScoreItem


class Scoring:
    """One teacher outside the learner. `identity` is who answered when the run began: nobody else is believed.

    hidden_size  of the states that it sends; 0: none
    """

    def __init__(self, scorer: Scorer, identity: TeacherIdentity, objective: Objective, *, hidden_size: int) -> None:
        self._scorer = scorer
        self._identity = identity
        self._objective = objective
        self._ask = asked(objective, hidden_size=hidden_size)

    def believe(self, revision: str) -> None:
        """From now on only the teacher's `revision`."""
        self._identity = replace(self._identity, revision=revision)

    async def read(self, items: Sequence[ScoreItem], ask: Ask) -> list[TeacherScores]:
        """What it says of anything else, in the order of `items`. Raises TeacherError."""
        return await self._scorer.score(items, ask, self._identity) if items else []

    async def score(self, rollouts: Sequence[Rollout], read: Mapping[str, tuple[Message, ...]]) -> list[ScoredRollout]:
        """The rollouts with their scores; None for those that no term reads scores of. Raises TeacherError.

        `read` is what the teacher reads, as text, by the prompt's id.
        """
        wanted = [rollout for rollout in rollouts if self._objective.scored(rollout.origin)]
        items = [_item(rollout, read[rollout.prompt_id]) for rollout in wanted]
        ask = self._ask
        if wanted and self._objective.num_draws and not ask.hidden:
            chosen = [_chosen(rollout) for rollout in wanted]
            ask = replace(ask, num_ids=max(width_of(ids) for ids in chosen))
            items = [replace(item, token_ids=filled(ids, ask.num_ids)) for item, ids in zip(items, chosen, strict=True)]
        answers = await self.read(items, ask)
        found = {
            rollout.id: _sorted_out(rollout, item.token_ids, scores)
            for rollout, item, scores in zip(wanted, items, answers, strict=True)
        }
        return [_scored(rollout, found.get(rollout.id)) for rollout in rollouts]


def asked(objective: Objective, *, hidden_size: int) -> Ask:
    """What the terms read of a teacher. Where one of them reads all logits the states say everything."""
    if objective.tier is Tier.FULL:
        return Ask(hidden=hidden_size)
    terms = _scoring(objective)
    gates = [gate for term in terms for gate in term.gates]
    own = [term.support.k for term in terms if isinstance(term.support, TeacherTopK)]
    own += [1 for gate in gates if isinstance(gate, Confidence)]
    return Ask(
        top_k=max(own, default=0),
        num_ids=support_k(objective),
        entropy=any(isinstance(gate, EntropyGap | TeacherEntropyAbove) for gate in gates),
    )


def support_k(objective: Objective) -> int:
    """Entries of the student's own top-k that are kept while it writes, for a teacher to score."""
    if objective.tier is Tier.FULL:
        return 0
    return max((term.support.k for term in _scoring(objective) if isinstance(term.support, StudentTopK)), default=0)


def _scoring(objective: Objective) -> list[Term]:
    return [term for term in objective.terms.values() if term.reads_scores]


def _item(rollout: Rollout, read: tuple[Message, ...]) -> ScoreItem:
    return ScoreItem(
        id=rollout.id,
        context_ids=rollout.prompt_ids,
        completion_ids=rollout.completion_ids,
        teacher_context_ids=rollout.teacher_context_ids,
        token_ids=rollout.support_ids,
        domain=rollout.domain,
        messages=read,
    )


def _chosen(rollout: Rollout) -> IntArray:
    """[T, N] the ids that a teacher is asked of a rollout with draws; text without any is asked of what it is."""
    parts = [ids for ids in (rollout.draw_ids, rollout.support_ids) if ids is not None]
    return np.concatenate(parts, axis=1) if parts else rollout.completion_ids[:, None]


def _sorted_out(rollout: Rollout, asked_ids: IntArray | None, scores: TeacherScores) -> TeacherScores:
    """What was said of ids that were asked once, as log-probs of each draw and of the student's top-k."""
    if rollout.draw_ids is None or scores.ids_logprobs is None or scores.ids_tail is None:
        return scores
    assert asked_ids is not None, "the teacher answered for ids that it was asked"
    draws, _ = among(asked_ids, scores.ids_logprobs, scores.ids_tail, rollout.draw_ids)
    if rollout.support_ids is None:
        return replace(scores, draws=draws, ids_logprobs=None, ids_tail=None)
    kept, tail = among(asked_ids, scores.ids_logprobs, scores.ids_tail, rollout.support_ids)
    return replace(scores, draws=draws, ids_logprobs=kept, ids_tail=tail)


def _scored(rollout: Rollout, scores: TeacherScores | None) -> ScoredRollout:
    if scores is not None and scores.chunks is not None:
        rollout, scores = masked(rollout, scores)
    return ScoredRollout(rollout=rollout, scores=scores)
