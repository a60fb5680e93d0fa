"""The [teacher] table: whose weights, which context, where. One section a kind; config.py holds the rest of a run.

    server       potstill's own teacher server      self   the student, reading more     several  by domain, or together
    vllm         a stock vLLM server                local  models inside the learner     none     the text is the signal
    completions  an endpoint that echoes log-probs  openai somebody's API, text only

Secrets are named, never written: env:NAME or file:PATH.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.references import ForeignName, ModelRef, SecretRef, StateFile, TokenizerRef, Url
from potstill.section import Count, NotNegative, Positive, Section, Unit

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class Reading(Section):
    """What a teacher reads that the student does not."""

    privileged_template: str | None = None
    """How the teacher's own prompt reads, with {prompt}, {answer}, {solution} and, where somebody writes it, {advice};
    None: it reads the student's."""
    fade_steps: Count | None = None
    """Steps over which the privileged text that it shows fades from whole to nothing, sentence by sentence
    (SKIntern, 2409.13183); None: it stays. Too few: gone before the student can do without; too many: it never must."""


class Calling(Section):
    """How something is called over HTTP."""

    deadline_s: Positive = 60.0
    """Total time for one request with its retries. Too short: a busy teacher fails the run."""
    concurrency: Count = 4
    """Requests in flight per rollout worker, at most: fewer while the other side says that it is busy."""


class Scored(Reading, Calling):
    """What every teacher that scores over HTTP has."""

    tokenizer: TokenizerRef | None = None
    """Folder of the teacher's tokenizer where it is not the student's: text is then scored in spans of equal bytes."""
    cache_mib: Count | None = None
    """Memory of each rollout worker for scores of text that comes back, such as references over several epochs or
    replayed rollouts. Too small: they are gone before they come back. None: nothing is kept."""


class ServerTeacher(Scored):
    """A teacher behind HTTP (`potstill teacher serve`): a running server by url, or a model folder to start one."""

    kind: Literal["server"] = "server"
    url: Url | None = None
    """Base URL of a running teacher server, e.g. http://127.0.0.1:8001."""
    replicas: tuple[Url, ...] = ()
    """Further servers of the same model, asked when the one before is away. Another model or revision is refused."""
    model: ModelRef | None = None
    """Model folder: the run starts its own teacher server on loopback and ends it with the run."""
    head: ModelRef | None = None
    """Of `url`: a folder with the model that it serves, for methods that read all logits. The learner multiplies its
    output head, and no other's, with the states that the teacher sends: 2 · hidden size bytes a token. They are rounded
    to bfloat16, which moves a log-prob by 0.003 nats on average, 0.02 at most, where logits spread by 2. None: such
    methods are refused; with `model` it is that folder's."""
    secret_ref: SecretRef | None = None
    """Where the bearer key of `url` is kept: env:NAME or file:PATH. Never the key itself."""
    threads: Count = 1
    """CPU threads of a server that the run starts itself."""
    follows: Literal["nobody", "student"] = "nobody"
    """student: a self-teacher too large for the learner: every version of the student is pushed to it (ema_decay)."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of follows = "student", per step: it becomes ema_decay · its own weights + the rest · the student's. 0 is a live
    teacher, which may diverge; near 1 it hardly moves."""

    @model_validator(mode="after")
    def _one_source(self) -> ServerTeacher:
        if (self.url is None) == (self.model is None):
            raise ValueError("name exactly one of teacher.url (a running server) and teacher.model (a folder to serve)")
        if (self.url is None) != (self.secret_ref is None):
            raise ValueError("teacher.url goes with teacher.secret_ref, where its key is kept: env:NAME or file:PATH")
        if self.replicas and self.url is None:
            raise ValueError("teacher.replicas stand beside teacher.url")
        if self.head is not None and (self.url is None or not self.keeps_head):
            raise ValueError("teacher.head stands beside teacher.url, without teacher.tokenizer and teacher.follows")
        return self

    @property
    def keeps_head(self) -> bool:
        """Whether it has one output head for the whole run, over the student's tokens."""
        return self.tokenizer is None and self.follows == "nobody"

    @property
    def head_folder(self) -> str | None:
        """The model whose head its states are for; None where there is no such head, or nobody has named it."""
        return (self.head or self.model) if self.keeps_head else None


class EndpointTeacher(Scored):
    """An endpoint that is not potstill's and scores given text. It is known by its name: nothing tells its weights."""

    url: Url
    """Base URL without /v1, e.g. http://127.0.0.1:8000."""
    model: ForeignName
    """As the server calls it."""
    secret_ref: SecretRef | None = None
    """Where its key is kept, if it wants one."""
    revision: str = "unversioned"
    """Of the served weights, in your words. Scores are only ever mixed or kept under one revision."""


class VllmTeacher(EndpointTeacher):
    """A stock vLLM server (`vllm serve`), asked for prompt log-probs by token ids."""

    kind: Literal["vllm"] = "vllm"


class CompletionsTeacher(EndpointTeacher):
    """Any OpenAI-compatible /v1/completions that echoes a prompt with its log-probs."""

    kind: Literal["completions"] = "completions"
    context_length: Count
    """Tokens that the model reads, which this API does not tell. Too large: the endpoint refuses; too small: we do."""


class RemoteWriter(Calling):
    """Somebody's API that answers prompts with text. Answers are kept on disk and never paid for twice."""

    url: Url
    """Base URL, e.g. https://api.example.com; one that names its version is taken as it is: …/v1beta/openai."""
    model: ForeignName
    """As the API calls it."""
    secret_ref: SecretRef | None = None
    """Where its key is kept, if it wants one: env:NAME or file:PATH. Never the key itself."""
    instruction: str = "{prompt}"
    """What it is asked, with {prompt}, {answer} and {solution} of the task."""
    temperature: NotNegative = 0.0
    """Of its answers. 0: the same answer whenever it is asked."""
    max_tokens: Count = 512
    """Of an answer. Too small: cut answers, which are learnt without an end."""
    answers: StateFile = "runs/answers.sqlite"
    """File that keeps answers, for this run and later ones."""
    price_in: NotNegative = 0.0
    """Dollars for a million tokens that it reads."""
    price_out: NotNegative = 0.0
    """Dollars for a million tokens that it writes."""
    budget: Positive | None = None
    """Dollars that this run may spend; it stops before it would spend more. None: no limit."""

    @model_validator(mode="after")
    def _budget_has_prices(self) -> RemoteWriter:
        if self.budget is not None and self.price_in == self.price_out == 0:
            raise ValueError(
                "budget is counted in dollars: give price_in and price_out, or the budget is never reached"
            )
        return self


class OpenAITeacher(RemoteWriter):
    """A black box as the teacher: it writes text that the student learns from, or ranks what the student wrote."""

    kind: Literal["openai"] = "openai"
    ranks: Literal["no", "asked", "likeness"] = "no"
    """Where the rewards of the student's completions come from. no: the data's verifier; asked: the black box puts them
    in order; likeness: how near each is to the black box's own answer."""
    ranking: str = (
        "Question:\n{prompt}\n\nAnswers:\n{answers}\n\n"
        "Put the answers in order, the best first. Reply with their numbers only, separated by commas."
    )
    """Of ranks = "asked": what it is asked, with {prompt} and the numbered {answers}."""


class SelfTeacher(Reading):
    """The student's own weights, reading a privileged prompt. Lives inside the learner; nothing travels."""

    kind: Literal["self"] = "self"
    weights: Literal["frozen", "ema", "live", "trust_region"] = "frozen"
    """frozen: the student as the run found it; ema: its moving average; live: the current student, without gradient;
    trust_region: between the frozen and the live one (SDPO, 2601.20802)."""
    trust: Unit = 0.01
    """Of weights = "trust_region": share of the live student's logits. Near 1 is a live teacher, which may diverge."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of weights = "ema", per step. Near 1 the teacher hardly moves; too small is a live teacher, which may diverge."""
    privileged_template: str
    """How the teacher's own prompt reads, with {prompt}, {answer}, {solution} and {advice}, e.g.
    "{prompt}\\nHint: {answer}"."""
    advisor: RemoteWriter | None = None
    """A black box that writes {advice} for every prompt: a solution, a critique, a skill. None: nobody does."""

    @model_validator(mode="after")
    def _advice_is_written(self) -> SelfTeacher:
        if ("{advice}" in self.privileged_template) != (self.advisor is not None):
            raise ValueError("{advice} in teacher.privileged_template goes with teacher.advisor, who writes it")
        return self


class LocalModel(Section):
    """One of the models that teach inside the learner."""

    model: ModelRef
    """A folder in Hugging Face format, with the student's tokenizer."""
    weight: Positive = 1.0
    """Of this model where several score the same token; the weights are scaled to sum to 1."""
    domains: tuple[str, ...] = ()
    """Prompts that it scores, by domain. Empty: all."""


class LocalTeacher(Reading):
    """Other models, loaded beside the student in the learner: every logit is at hand, and no server is needed."""

    kind: Literal["local"] = "local"
    models: Annotated[tuple[LocalModel, ...], Field(min_length=1)]
    """One, or several whose predictions are combined."""
    combine: Literal["logits", "probabilities"] = "logits"
    """Of several: the mean of their logits (a geometric mean), or of their probabilities."""
    learn_weights: Positive | None = None
    """Of several without domains: rate at which their weights follow how probable each finds text that proved right. A
    step multiplies a weight by exp(-rate · (1 - geometric mean probability)); all are scaled to sum to 1 again. Too
    large: a few steps, or text that one of them wrote, leave a single teacher; too small: the weights stay as given.
    None: they do. Costs one more pass of each over the right text."""


class Member(Section):
    """One of several teachers that are asked over HTTP."""

    teacher: Annotated[ServerTeacher | VllmTeacher | CompletionsTeacher, Field(discriminator="kind")]
    """How it is reached."""
    weight: Positive = 1.0
    """Where several score the same token; the weights are scaled to sum to 1."""
    domains: tuple[str, ...] = ()
    """Prompts that it scores, by domain. Empty: all."""


class SeveralTeachers(Reading):
    """Several teachers over HTTP, of any kinds: each for its domains, or their mean. All read the same context."""

    kind: Literal["several"] = "several"
    members: Annotated[dict[Name, Member], Field(min_length=2)]
    """By name: lower-case letters, digits, - and _; the log of one that the run starts is called by it. A prompt whose
    domain no member has stops the run. Where several score a token, their probabilities are averaged: each must offer
    log-probs of the ids that the method reads."""

    @model_validator(mode="after")
    def _one_context(self) -> SeveralTeachers:
        for name, member in self.members.items():
            if member.teacher.privileged_template is not None or member.teacher.fade_steps is not None:
                raise ValueError(f"teacher.members.{name}: privileged_template and fade_steps stand at [teacher]")
            if getattr(member.teacher, "head", None) is not None:
                raise ValueError(f"teacher.members.{name}.teacher.head: several are read by log-probs, not by states")
            if member.teacher.tokenizer is not None and not member.domains:
                raise ValueError(f"teacher.members.{name}: a teacher of another tokenizer has domains of its own")
        return self


class NoTeacher(Section):
    """For supervised runs: the text itself is the signal."""

    kind: Literal["none"] = "none"


TeacherConfig = Annotated[
    ServerTeacher
    | VllmTeacher
    | CompletionsTeacher
    | OpenAITeacher
    | SelfTeacher
    | LocalTeacher
    | SeveralTeachers
    | NoTeacher,
    Field(discriminator="kind"),
]
