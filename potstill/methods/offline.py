"""Text that the teacher or the data wrote: the off-policy baselines and first stages."""

from __future__ import annotations

from potstill.methods.method import Method, objective

OFFLINE: dict[str, Method] = {
    "sft": Method(
        objective=objective(support="sampled", loss="likelihood", over="others"),
        phrase="likelihood of reference or teacher text; the off-policy baseline",
        source="sequence-level knowledge distillation (SeqKD), arXiv 1606.07947, with the teacher's one answer for its "
        "distribution; over the step's tokens where the paper sums",
        signal="text",
        granularity="sequence",
        good_at="First stages, any teacher that writes text, and the control of every on-policy claim.",
        trap="The student learns at the teacher's states only: its own mistakes lead where it was never taught.",
    ),
    "skintern": Method(
        objective=objective(support="sampled", loss="likelihood", over="others"),
        phrase="likelihood of solutions under a prompt whose knowledge fades until the question stands alone",
        source="SKIntern, arXiv 2409.13183: the share of what the prompt shows is 1 − t/T, T = teacher.fade_steps. Its "
        "knowledge and demonstrations are here what the template shows of the row, cut by sentences in their order. "
        "Not taken: a prompt compressor that ranks tokens; T of the paper was not recovered",
        signal="text",
        granularity="sequence",
        context="privileged",
        good_at="Small students that reason well with knowledge at hand and must do without it in the end.",
        trap="A template that shows the {solution} which is learnt teaches copying first: T must leave steps after it. "
        "Without fade_steps the student never learns under its own prompt.",
        settings={"rollout.source": "reference", "rollout.privileged_share": 1.0, "teacher.kind": "self"},
    ),
    "dasd": Method(
        objective=objective(support="sampled", loss="likelihood", over="others"),
        phrase="likelihood of answers that the student began and the teacher ended, prefix included",
        source="DASD, arXiv 2601.09088, its hand-off stage: cut at random beyond half; numbers are those of its two "
        "stages of supervised tuning. Masking the student's prefix costs about 2 points there, so it is learnt. Not "
        "taken: handing off only answers that were cut for their length, and its filters",
        signal="text",
        granularity="sequence",
        good_at="Long reasoning after supervised tuning: the teacher shows a way on from where the student really is.",
        trap="Unfiltered hand-offs teach the student's repetitions; the paper mixes 13K with 20K plain answers.",
        settings={
            "rollout.source": "handoff",
            "rollout.prompts_per_step": 64,
            "optim.lr": 5e-5,
            "optim.schedule": "cosine",
            "optim.min_lr_ratio": 0.2,
            "optim.weight_decay": 0.1,
            "optim.betas": (0.9, 0.95),
        },
    ),
    "soda": Method(
        objective=objective(
            support="sampled", loss={"kind": "preference", "beta": 0.1}, over="all", aggregation="sequence_sum"
        ),
        phrase="preference for the teacher's answer over the student's own, in pairs",
        source="SODA, arXiv 2604.03873: DPO's loss, its reference the warmed-up student. β = 0.1 is DPO's: the paper's "
        "own was not recovered",
        signal="preference",
        granularity="sequence",
        good_at="A teacher of which only text can be had, at a tenth of the cost of a discriminator.",
        trap="Both likelihoods may fall together, and length is preferred; static answers stop telling anything once "
        "the student has left them.",
        settings={"rollout.source": "snapshot", "rollout.samples_per_prompt": 1, "rollout.beside": "teacher"},
    ),
}
