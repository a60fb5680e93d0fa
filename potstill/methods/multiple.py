"""Several teachers: each for its own domain, or all of them as one.

Their models are named in [teacher] of kind "local"; an objective only says what it makes of their prediction.
"""

from __future__ import annotations

from potstill.methods.method import Method, objective

MULTIPLE: dict[str, Method] = {
    "mopd": Method(
        objective=objective(
            support="sampled",
            loss="policy_gradient",
            over="student",
            correction={"kind": "masked", "low": 0.5, "high": 2.0},
            aggregation="sequence_mean",
        ),
        phrase="a specialist for every domain, sampled-token policy gradient with IcePop's mask",
        source="MOPD, arXiv 2601.02780 §4.4; the mask's bounds are the project's, and its outcome reward is off: "
        "loss.reward is its α. NeMo-RL's port switches the ratio itself off, which is not taken",
        signal="sampled",
        granularity="token",
        good_at="One student out of several specialists, without their see-saw.",
        trap="A prompt whose domain no model names stops the run; a domain that is rare in the batch is hardly learnt.",
        settings={"teacher.kind": "local"},
    ),
    "multi_teacher": Method(
        objective=objective(support="full", loss="reverse_kl", over="student"),
        phrase="reverse KL to the weighted mean of several teachers' probabilities, on the student's text",
        source="the arithmetic mean of an ensemble (arXiv 1503.02531, §1) as the teacher of GKD's reverse KL "
        "(arXiv 2306.13649), mean over tokens",
        signal="divergence",
        granularity="token",
        good_at="Teachers that know different things about the same prompt: each token may follow any of them.",
        trap='A reverse KL picks one of them; teacher.combine = "logits" keeps only what all agree on.',
        settings={"teacher.kind": "local", "teacher.combine": "probabilities"},
    ),
    "baby_llama": Method(
        objective=objective(
            weight=0.5,
            support="full",
            loss="forward_kl",
            over="others",
            target={"kind": "tempered", "student": 2.0, "teacher": 2.0, "times_square": True},
            auxiliaries={"text": {"weight": 0.5, "over": "others", "loss": "likelihood"}},
        ),
        phrase="forward KL at T = 2 to the mean of several teachers' logits, and half cross-entropy, on given text",
        source="Baby Llama, arXiv 2308.02019; the mean over tokens, where its code divides by the batch alone and so "
        "grows with length",
        signal="divergence",
        granularity="token",
        good_at="Little text and small models: the student passed both its teachers.",
        trap="Teachers of different sharpness do not count the same: the mean of logits follows the sharper one.",
        settings={
            "teacher.kind": "local",
            "teacher.combine": "logits",
            "rollout.source": "reference",
            "rollout.prompts_per_step": 32,
            "optim.lr": 2.5e-4,
            "optim.warmup_steps": 200,
            "optim.weight_decay": 0.1,
        },
    ),
}
