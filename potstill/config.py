"""RunConfig: everything that decides a run, in one frozen tree. Every default that changes a number lives here.

The [teacher] table is in config_teachers.py, [alarms] in config_alarms.py, [objective] in algebra/. It reads no file
and no override: config_file.py does. Unknown keys are errors; a renamed key keeps no alias.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from potstill.algebra.objective import Objective, lay_over
from potstill.config_alarms import AlarmsConfig
from potstill.config_resources import ResourcesConfig
from potstill.config_sinks import SinksConfig
from potstill.config_teachers import TeacherConfig
from potstill.config_vllm import VllmConfig
from potstill.config_weights import WeightsConfig
from potstill.methods import PRESETS
from potstill.nearest import hint
from potstill.references import DataRef, ModelRef, Options, Port, StateFile
from potstill.section import Section

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class LoraConfig(Section):
    """Low-rank adapters instead of full weights. The teacher `self/frozen` is then the student without its adapter."""

    rank: Positive
    """Width of the adapter. Too small: the student cannot follow; too large: as much memory as all weights."""
    alpha: Annotated[float, Field(gt=0)]
    """The update is scaled by alpha / rank. Too large acts like a learning rate that is too large."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter. The output head is never one of them."""


class StudentConfig(Section):
    """The model that writes and learns."""

    model: ModelRef
    """A folder in Hugging Face format: config.json, model.safetensors, tokenizer files with a chat template."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which learner and engine compute, alike. bfloat16: half the memory of the engine, and on GPUs ten times the
    speed; the learner keeps the trained weights in float32 behind it, so that no small update is lost."""
    lora: LoraConfig | None = None
    """None: all weights are trained."""


class ReasoningGymData(Section):
    """Procedural tasks with their own verifier, from the reasoning-gym package. No download."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str
    """A reasoning-gym dataset, e.g. "chain_sum"."""
    options: Options = Field(default_factory=dict)
    """Its generator's settings, e.g. {min_digits = 3}."""
    seed: Seed = 0
    """Of the task stream. Held-out items come from a stream of their own and are never trained on."""


class JsonlData(Section):
    """A JSON Lines file, one object a line: `prompt` (text or a list of messages) and, where known, `answer`,
    `solution`, `domain` and `private`, a list of texts that method "swing" shall teach less of, exactly as written."""

    kind: Literal["jsonl"] = "jsonl"
    path: DataRef
    """Of the file, from where the run is started."""
    holdout: Annotated[int, Field(ge=0)] = 0
    """The last lines, kept for evaluation and never trained on."""
    verifier: Literal["none", "exact", "last_number"] = "none"
    """exact: the completion equals the answer; last_number: its last number does; none: no accuracy is reported."""


DataConfig = Annotated[ReasoningGymData | JsonlData, Field(discriminator="kind")]


class SamplingConfig(Section):
    """How the student writes. Every field reaches the engine; nothing is left to the model's generation_config.json."""

    max_new_tokens: Positive
    """Completions are cut here and marked `length`. Too small: answers are cut before they are given."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 is greedy. Anything but 1 while training changes the distribution that the loss assumes."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Below 1 the sampler's distribution is cut off and importance ratios shrink."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: all tokens. As top_p."""


class AdaptiveConfig(Section):
    """DistiLLM's schedule of whose text a step learns (2402.03898, §3.2): the data's solutions at first and, the more
    often the loss of held-out ones has risen, the student's own, new or from earlier steps."""

    validate_every: Positive
    """Steps between validations. Too few: time, and noise that passes for rises; too many: the share follows late."""
    validate_items: Positive = 64
    """Held-out solutions that are validated on. Too few: a noisy loss rises by chance; too many: time."""
    rises: Positive = 10
    """Rises of the loss until all text is the student's own. Too few: one noisy validation decides; too many: the
    student never writes."""
    tolerance: Annotated[float, Field(ge=0)] = 0.1
    """Nats a token that a rise must exceed to count. Too small: noise is a rise; too large: nothing is."""
    capacity: Positive = 1000
    """Texts of the student that are kept; the oldest go first. Too small: the same few again and again; too large: text
    that the student has long outgrown. A checkpoint holds them all."""


class RolloutConfig(Section):
    """Who writes the completions, with which engine, and how many."""

    source: Literal["student", "snapshot", "teacher", "reference", "handoff", "revision"] = "student"
    """student: on-policy; snapshot: a model that never changes writes in its place (SODA's rejected answers); teacher:
    the teacher writes (off-policy); reference: the data's own solutions, unchanged; handoff: the student begins and the
    teacher ends (DASD); revision: the student writes, the teacher replaces one token, where the two differ most, and
    the student writes on from there (SCRG)."""
    handoff_after: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Of source = "handoff": the least share of the student's answer that stays; where it is cut is random from there
    on. Too small: the teacher writes nearly all; near 1: nothing is left to mend."""
    revision_k: Positive = 32
    """Of source = "revision": the student's most probable tokens, over which that difference is measured. Too small:
    what the two disagree about lies in the rest; too large: a teacher is asked for numbers that move no token."""
    snapshot: ModelRef | None = None
    """Of source = "snapshot": its folder, with the student's tokenizer. None: the student as the run found it."""
    beside: Literal["none", "teacher", "reference"] = "none"
    """Text that the student did not write, learnt in the same step by terms that are over "all" or "others"."""
    beside_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the prompts that get such a text."""
    beside_instead: bool = False
    """At those prompts the student does not write (GKD's λ is then 1 - beside_share)."""
    adaptive: AdaptiveConfig | None = None
    """Steps on the data's solutions or on earlier text in place of new text of the student. None: it always writes."""
    view: Literal["own", "privileged"] = "own"
    """privileged: the student writes under the teacher's prompt and learns it under both (π-Distill)."""
    engine: Literal["vllm", "transformers"] = "transformers"
    """transformers: starts at once, bit-exact, for small models; vllm: for everything else."""
    vllm: VllmConfig = VllmConfig()
    workers: Positive = 1
    """Rollout worker processes."""
    min_workers: Positive = 1
    """With how many of them a run begins; the others join when the cluster has room for them. More than fit: it waits
    for ever."""
    prompts_per_call: Positive | None = None
    """Prompts that a worker is given at a time. None: its share of a step. Too few: small batches for the transformers
    engine; too many: long answers hold short ones up."""
    calls: Positive | None = None
    """Such calls that a worker has at once: while one waits for scores another is written. None: 1 when synchronous,
    else 2. Too many: what waits grows old."""
    threads: Positive = 1
    """CPU threads of each worker. More than the cores there are makes every process slower."""
    prompts_per_step: Positive
    """Prompts in one optimizer step. Too few: a noisy gradient; too many: fewer, staler updates."""
    privileged_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of references that are learnt under the teacher's privileged prompt: how a student first learns to use a hint."""
    samples_per_prompt: Positive = 1
    """Completions of each prompt."""
    max_prompt_tokens: Positive = 512
    """Engines make room for prompts of this length; a longer one stops the run. Too large: wasted memory."""
    sampling: SamplingConfig

    @property
    def references_alone(self) -> bool:
        """Whether all text that the student did not write is the data's solutions, and there is some."""
        return {self.source, self.beside} - {"none", "student", "snapshot"} == {"reference"}


class OptimConfig(Section):
    """AdamW."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate. Distillation is touchy: twice the best value often diverges."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0. None: Adam's first steps are as large as its later ones."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After warm-up; cosine and linear fall towards min_lr_ratio."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of the peak, which the schedule reaches one step after the last."""
    betas: tuple[float, float] = (0.9, 0.95)
    """A second beta near 1 reacts slowly when the student's distribution moves."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Too large: small gradients are ignored."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """On matrices only, never on norms and biases. Too large pulls the student away from what it knew."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Global norm at which the gradient is clipped. Too small: every step is clipped and lr means something else."""


class LearnerConfig(Section):
    """How a step is computed. None of these changes the numbers beyond rounding."""

    micro_batch_tokens: Positive = 8192
    """Prompt and completion tokens packed into one forward pass. Too large: out of memory."""
    chunk_tokens: Positive = 512
    """Rows of logits that exist at a time. Too small: slow; too large: [rows × vocabulary] floats of memory."""
    recompute: bool = False
    """Keep only the states between layers for the backward pass, and compute the rest again there: a third more work,
    and a fraction of the memory that a micro-batch takes. For students of billions of weights, or long texts."""
    threads: Positive = 1
    """CPU threads."""
    ranks: Positive = 1
    """Processes that make a step together: each holds a share of the student, of its gradients and of the optimizer,
    and passes over a share of the text. A teacher of kind "local" is whole on each. Too few: the student does not fit,
    or workers wait for the learner; too many: ranks wait for each other's weights, and for the longest text."""


class LoopConfig(Section):
    """How long, and how far generation may run ahead."""

    steps: Annotated[int, Field(ge=0)]
    """Optimizer steps. 0 evaluates and stops."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Versions by which a rollout may trail the student it trains. 0 is synchronous and reproducible."""
    max_unscored_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of a step's loss tokens that the teacher may have failed to score before the run stops."""
    max_train_tokens: Positive | None = None
    """Stop after the step in which this many loss tokens have been trained; for comparisons at equal tokens."""
    order: Literal["prompt", "finish"] = "prompt"
    """prompt: a step trains its own prompts, reproducibly, and waits for the longest answer; finish: it trains the
    first that are finished, and short answers come earlier than long ones."""
    oversample: Annotated[float, Field(ge=0)] = 0.0
    """Of order = "finish": prompts written beyond what steps need, as a share of a step. Too few: workers idle behind
    the longest answers; too many: what is written is too old before it is trained."""
    stale: Literal["refuse", "mask"] = "refuse"
    """A text older than max_staleness when its turn comes. refuse: it is ended and written anew; mask: its fresh tokens
    are trained and its older ones only read, so that a long answer may go on over many versions."""
    silence_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds without a sign of life after which a process counts as lost. Too few: a busy process is killed; too many:
    a frozen one holds the run up."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Losses of a process in a row, with no work done between them, after which the run fails. 0: at the first loss.
    Too many: a run that cannot work tries for hours."""
    teacher_wait_s: Annotated[float, Field(ge=0)] = 600.0
    """Seconds that a run waits for a teacher that is away, each time, before it fails. Too few: a restart of the
    teacher ends the run; too many: processors are held for nothing."""
    metrics_port: Port | None = None
    """Port on loopback where Prometheus finds the run's numbers while it goes on. 0: any free one, which the event
    metrics.served names. Taken by another run: this one does not begin."""


class EvalConfig(Section):
    """Accuracy on held-out items, by the data's verifier, one answer to each."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: the greedy answer; 1: an answer as the student really writes. Neither is right: say which you report."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0: only before and after."""
    items: Annotated[int, Field(ge=0)] = 0
    """Held-out items before and after the run; 0: never evaluate."""
    items_between: Positive = 64
    """Held-out items of the evaluations between, which are for the curve."""


class CheckpointConfig(Section):
    """What is written while the run goes on. The last step is always written."""

    every: Annotated[int, Field(ge=0)] = 100
    """Steps between checkpoints, and what a run that lost its learner must do again; 0: only the last. Too few: the
    disk is busy all the time."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; older ones are removed after a newer one is complete and has been read back. One alone would
    leave nothing to fall back on when its disk damages it; too large: the disk fills with copies of the model."""


class ScratchConfig(Section):
    """A model from nothing, of the Qwen3 architecture, with a byte-level tokenizer trained on the task's own text."""

    hidden: Positive
    """Width. With `layers` it decides what the model can learn at all."""
    intermediate: Positive
    """Width of the feed-forward layers, usually 2 to 4 times `hidden`."""
    layers: Positive
    """Depth. Carrying a digit from column to column takes more than one."""
    heads: Positive
    """Heads of queries."""
    kv_heads: Positive
    """Heads of keys and values; a divisor of `heads`."""
    head_dim: Positive = 32
    """Width of a head. Engines have kernels for 32, 64, 128, …"""
    vocab_size: Positive = 320
    """Tokens at most: 256 bytes, the special ones and merges; `whole_tokens` come on top."""
    max_positions: Positive = 512
    """Longest sequence."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary positions. Too small: distant tokens look near."""
    whole_tokens: tuple[str, ...] = ("<answer>", "</answer>")
    """Strings that become one token each."""


class RunConfig(Section):
    """A run. `name` is also the name of its folder below `runs`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Lower-case letters, digits, - and _; 63 at most."""
    runs: StateFile = "runs"
    """Folder that holds the run's folder."""
    seed: Seed = 0
    """Of prompts, sampling and initial weights of adapters."""
    method: str
    """A preset: see `potstill methods`."""
    objective: Objective
    """The preset's choices with this table's changes to them."""
    student: StudentConfig
    teacher: TeacherConfig
    data: DataConfig
    rollout: RolloutConfig
    optim: OptimConfig
    loop: LoopConfig
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    weights: WeightsConfig = WeightsConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    resources: ResourcesConfig = ResourcesConfig()
    sinks: SinksConfig = SinksConfig()

    @model_validator(mode="before")
    @classmethod
    def _resolve_objective(cls, raw: Any) -> Any:
        """Lay the file's [objective] table over the preset's, so that the resolved config says everything."""
        if not isinstance(raw, dict) or not isinstance(raw.get("method"), str):
            return raw
        preset = PRESETS.get(raw["method"])
        if preset is None:
            raise ValueError(f"method {raw['method']!r} is not known{hint(raw['method'], PRESETS)}")
        changes = raw.get("objective", {})
        if isinstance(changes, Objective):
            changes = changes.model_dump()
        if not isinstance(changes, dict):
            return raw
        return {**raw, "objective": lay_over(preset.objective.model_dump(), changes)}
