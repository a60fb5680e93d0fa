"""The [alarms] table: what makes a run warn, pause or stop before its numbers lie.

Settings only: orchestrator/alarms.py judges a step by them. What no run survives (a NaN, damaged weights, a canary that
dies) is no setting and is not here: docs/alarms.md has it beside these.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from potstill.section import Count, Positive, Section, Unit

Action = Literal["off", "warn", "pause", "stop"]
Growth = Annotated[float, Field(gt=1)]


class AlarmConfig(Section):
    """What all alarms have."""

    action: Action = "warn"
    """warn: an event, and the run goes on; pause: a checkpoint, and the run ends so that it can be resumed; stop: the
    run fails; off: nobody looks."""
    patience: Count = 3
    """Steps in a row that must be out of bounds. Too few: an odd batch is an alarm; too many: some collapse in 30."""
    threshold: float
    """Of the alarm's metric, where it sounds."""


class Length(AlarmConfig):
    """The student's answers grow: the first sign of most collapses (arXiv 2604.08527)."""

    threshold: Growth = 2.0
    """Mean length over that of the run's beginning. Too small: a student that learns to reason is an alarm; too large:
    answers are cut before it sounds."""


class Truncation(AlarmConfig):
    """Answers are cut at max_new_tokens, before their end token: what follows is length inflation."""

    threshold: Unit = 0.5
    """Share of a step's completions. Too small: a student that starts by rambling is an alarm; too large: nearly no end
    token is left to learn from."""


class Repetition(AlarmConfig):
    """Answers end in loops, whose tokens teachers like: they get 4 to 9 times the advantage (arXiv 2604.08527)."""

    threshold: Growth = 10.0
    """zlib ratio that one completion in ten exceeds. Too small: tables and code are loops; too large: only a single
    token, over and over, is one."""


class EntropyOfTeacher(AlarmConfig):
    """The student is far surer than its teacher: it has fallen into one mode, and no other will be sampled again."""

    threshold: Unit = 0.2
    """Student's entropy over the teacher's. Too small: there is nothing left to save; too large: a reverse KL, which
    seeks a mode, is an alarm by itself."""


class EntropyDrop(AlarmConfig):
    """The same where the teacher's entropy is not known: the student is far surer than it was."""

    threshold: Unit = 0.02
    """Entropy over that of the run's beginning. Too small: there is nothing left to save; too large: a student that
    learns a task with one right answer is an alarm."""


class CapturedMass(AlarmConfig):
    """The student puts its mass outside the objective's top-k, where the loss hardly sees it."""

    threshold: Unit = 0.8
    """Student's probability inside the top-k. Too small: most of the student is out of sight before it sounds; too
    large: a small k is an alarm."""


class CapturedMassTeacher(AlarmConfig):
    """The teacher has its mass outside the objective's top-k: what it would teach is not among what is compared."""

    threshold: Unit = 0.5
    """Teacher's probability inside the top-k. Too small: the step learns what not to say, and not what to; too large: a
    weak student's first steps are an alarm."""


class Overlap(AlarmConfig):
    """Student and teacher hardly agree on any token: distillation works where they think alike (arXiv 2604.13016)."""

    threshold: Unit = 0.3
    """Probability that they share. Too small: they are strangers before it sounds; too large: an ordinary student is an
    alarm before its first steps."""


class Staleness(AlarmConfig):
    """The student has moved further from the text that it learns than its age explains."""

    threshold: Positive = 0.02
    """Nats a token and version of age, as the k3 estimate of KL(sampler ‖ student). Too small: every larger learning
    rate is an alarm; too large: the gradient is of another policy's text (rejection rules of the field cut at 0.001 to
    0.01 for a completion)."""


class SamplerGap(AlarmConfig):
    """Engine and learner, at the same weights, disagree on the text: every importance ratio is then wrong."""

    threshold: Positive = 0.05
    """Nats a token, mean of |log q − log μ|. Too small: bfloat16, at 0.01, is an alarm; too large: stale or wrong
    weights in an engine pass."""


class TeacherGap(AlarmConfig):
    """Student and teacher are so far apart on the student's text that they hardly read the same: another template,
    tokenizer or context, or a student that has run away."""

    threshold: Positive = 2.0
    """Nats a token, reverse KL. Too small: a weak student's first steps are an alarm; too large: a run that diverges is
    far gone. A template that is wrong by a few tokens stays below any bound (0.3 in a known case)."""


class Unscored(AlarmConfig):
    """The teacher fails to score tokens. `loop.max_unscored_fraction` ends the run; this says so earlier."""

    threshold: Unit = 0.02
    """Share of a step's loss tokens; below loop.max_unscored_fraction, or the run ends first. Too small: one lost reply
    in a large step is an alarm; too large: no warning is left."""


class AlarmsConfig(Section):
    """Signal health: what is watched after every step, and what is done about it. docs/alarms.md explains each."""

    beginning: Count = 10
    """Steps whose median is a run's own beginning. Too few: one odd batch is the yardstick; too many: a run that
    collapses within them is its own yardstick."""
    length: Length = Length()
    truncation: Truncation = Truncation()
    repetition: Repetition = Repetition()
    entropy: EntropyOfTeacher = EntropyOfTeacher()
    entropy_drop: EntropyDrop = EntropyDrop()
    captured_mass: CapturedMass = CapturedMass()
    captured_mass_teacher: CapturedMassTeacher = CapturedMassTeacher()
    overlap: Overlap = Overlap()
    staleness: Staleness = Staleness()
    sampler_gap: SamplerGap = SamplerGap()
    teacher_gap: TeacherGap = TeacherGap()
    unscored: Unscored = Unscored()
