"""Every error potstill raises on purpose, as one tree.

PotstillError
  ConfigError           a setting is wrong; the message names it and the fix               exit 2
    PlanError           the method needs what this teacher or machine cannot give          exit 2
    TokenizerMismatch   student and teacher do not share a vocabulary                      exit 2
  RunError              a run that had started cannot go on                                exit 1
    NonFinite           a loss, gradient or score is NaN or infinite                       exit 1
    WeightsError        weights arrived damaged, incomplete or of the wrong shape          exit 1
      StaleWeights      weights older than those already loaded, or no longer kept         exit 1
    AlignmentError      scores do not belong to the tokens that were asked for             exit 1
    WorkerLost          a process of the run died or fell silent                           exit 1
      LearnerLost       the one that learns: the run goes back to its last checkpoint      exit 1
      MemoryLost        ended for the memory that it took; it is a CapacityError too       exit 1
    CapacityError       no room in time for the run's processes, or too little memory      exit 1
    SignalLost          too few tokens could be scored for the step to mean anything       exit 1
    AlarmRaised         an alarm sounded that pauses or stops the run                      exit 1
    Fenced              a newer attempt of the run is at work: this process must end       exit 1
    ChunkLost           a chunk of scored rollouts is missing or damaged: write it again   exit 1
  TeacherError          the teacher's side of a request                                    exit 3
    TeacherRefused      it understood and said no (4xx): mend the request                  exit 3
      NoAnswer          it was asked to write and gave no text, which it may charge for    exit 3
    TeacherUnavailable  away, overloaded or too slow (429, 5xx, timeout): try later        exit 3
    TargetRefused       the guard does not let this run call that address                  exit 3
    BudgetExhausted     the request would cost more than the budget has left               exit 3
  ServiceError          the control plane said no; carries status and code                 exit 4
  SinkError             a sink did not take what it was told; an event, and no run ends of it

Every class survives pickling, because Ray carries errors between processes: state lives in `args` alone.
"""

from __future__ import annotations


class PotstillError(Exception):
    """Root of the tree. `category` says whose problem it is: user, system, teacher or capacity."""

    exit_code = 1
    category = "system"


class ConfigError(PotstillError):
    """A setting is wrong. The message names the setting and what to write instead."""

    exit_code = 2
    category = "user"


class PlanError(ConfigError):
    """The method needs something that the teacher or the machine does not offer."""


class TokenizerMismatch(ConfigError):
    """Student and teacher would read the same token id as different text."""


class RunError(PotstillError):
    """A run that had started cannot go on. What it had achieved is in its run directory."""


class NonFinite(RunError):
    """A number that steers training is NaN or infinite; raised before the optimizer moves."""


class WeightsError(RunError):
    """A weights version is damaged, incomplete or shaped for another model; the engine must not serve."""


class StaleWeights(WeightsError):
    """A weights version that is past: the worker holds a newer one, or its bytes are gone. Ask for the newest."""


class AlignmentError(RunError):
    """Scores do not belong to the tokens they were asked for (ids, order or lengths differ)."""


class WorkerLost(RunError):
    """A rollout worker, learner or teacher process of the run died, or gave no sign of life for too long."""


class LearnerLost(WorkerLost):
    """The learner is gone, and the steps since the last checkpoint with it."""


class CapacityError(RunError):
    """The cluster had no room for the run's processes in time, or a machine too little memory for one of them. The
    message says what is missing, and which setting to lower."""

    category = "capacity"


class MemoryLost(WorkerLost, CapacityError):
    """A process of the run was ended for the memory that it took. As with every loss, another one takes its place."""


class SignalLost(RunError):
    """Too few tokens of the step carry a teacher's score for its gradient to mean anything."""


class AlarmRaised(RunError):
    """The run's numbers are not those of a healthy run; the message says which, and what to do."""


class Fenced(RunError):
    """A newer attempt of the run has begun: what this process still wants to write is not wanted any more."""


class ChunkLost(RunError):
    """A file of the run's spool is missing or damaged; its prompts must be written and scored again."""


class TeacherError(PotstillError):
    """The teacher's side of a request failed."""

    exit_code = 3
    category = "teacher"


class TeacherRefused(TeacherError):
    """The teacher understood the request and refused it (4xx). Mend the request; do not retry it."""


class NoAnswer(TeacherRefused):
    """A teacher that writes gave no text. args: message, tokens it read and tokens it wrote, None where not counted."""

    @property
    def tokens(self) -> tuple[int | None, int | None]:
        return self.args[1], self.args[2]

    def __str__(self) -> str:
        return str(self.args[0])


class TeacherUnavailable(TeacherError):
    """The teacher is away, overloaded or too slow. Retrying later may help."""


class TargetRefused(TeacherError):
    """A call would have gone to an address that it may not go to; no packet was sent. Mend URL or allow list."""


class BudgetExhausted(TeacherError):
    """A request may cost more than the budget has left; it was not sent."""


class ServiceError(PotstillError):
    """The control plane refused a request. args: message, HTTP status, machine-readable code."""

    exit_code = 4

    @property
    def status(self) -> int | None:
        return self.args[1] if len(self.args) > 1 else None

    @property
    def code(self) -> str | None:
        return self.args[2] if len(self.args) > 2 else None

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class SinkError(PotstillError):
    """A sink did not take what it was told, or cannot be opened. It becomes an event and ends no run."""
