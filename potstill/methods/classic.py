"""White-box distillation before the on-policy wave, and its divergences and targets.

Nearly all of it needs the teacher's whole distribution, so a teacher inside the learner (kind = "local") or a server
that sends its states.
"""

from __future__ import annotations

from potstill.methods.method import Method, objective

CLASSIC: dict[str, Method] = {
    "gkd": Method(
        objective=objective(support="full", loss={"kind": "jsd", "beta": 0.5}, aggregation="sequence_mean"),
        phrase="generalised JSD over the vocabulary, each completion counting the same",
        source="GKD, arXiv 2306.13649, eq. 1, mean over a sequence's tokens. λ is rollout.beside_share and "
        "beside_instead. Not taken from TRL: temperature 0.9 on both sides' logits.",
        signal="divergence",
        granularity="token",
        good_at="The balanced choice between covering and mode-seeking, bounded by log 2, from the student's own text.",
        trap="A cold student writes text that no teacher can comment on: start from a supervised one.",
        settings={
            "rollout.prompts_per_step": 32,
            "rollout.sampling.temperature": 1.0,
            "rollout.sampling.max_new_tokens": 64,
            "optim.lr": 3e-4,
            "optim.warmup_steps": 2000,
            "loop.steps": 40000,
        },
    ),
    "gkd_topk": Method(
        objective=objective(
            support={"kind": "teacher_topk", "k": 16}, loss={"kind": "jsd", "beta": 0.5}, aggregation="sequence_mean"
        ),
        phrase="generalised JSD over the teacher's top-k and a tail bucket, for a teacher behind HTTP",
        source="GKD, arXiv 2306.13649, eq. 1, over the teacher's top-k with the tail bucket of SDPO, arXiv 2601.20802; "
        "k = 16 is this project's",
        signal="divergence",
        granularity="token",
        good_at="GKD with a teacher that can only send its top-k.",
        trap="What the student likes and the teacher does not is one bucket: its tokens are not told apart.",
    ),
    "minillm": Method(
        objective=objective(
            over="student",
            support="full",
            loss="reverse_kl",
            correction="unclipped",
            aggregation="sequence_sum",
            auxiliaries={
                "long_term": {
                    "over": "student",
                    "loss": {
                        "kind": "policy_gradient",
                        "discount": 1.0,
                        "length_normalised": True,
                        "future_only": True,
                    },
                    "correction": "unclipped",
                    "aggregation": "sequence_sum",
                },
                "pretraining": {"weight": 0.5, "over": "others", "loss": "likelihood", "aggregation": "sequence_sum"},
            },
        ),
        phrase="reverse KL of whole sequences: exact for each token, length-normalised returns for what follows",
        source="MiniLLM, arXiv 2306.08543, its final gradient; 0.5 of the pre-training loss from its code, whose other "
        "half is a forward KL on that text. Not taken from the code: returns with γ = 0.95, of rewards over 0.5 "
        "clipped at 100, divided by a length that includes the token, whitened; no ratio on the exact term; PPO's "
        "clip; token means. The student writes alone: the paper's mixture with the teacher (α = 0.2) does not exist.",
        signal="divergence",
        granularity="hybrid",
        good_at="The gradient of the sequence's reverse KL, in which a token answers for what it leads to.",
        trap="Without the teacher in the sampler repeated tokens can win; without length_normalised empty answers do.",
        settings={
            "rollout.beside": "reference",
            "rollout.prompts_per_step": 16,
            "rollout.sampling.temperature": 1.0,
            "rollout.sampling.top_p": 1.0,
            "rollout.max_prompt_tokens": 256,
            "optim.lr": 5e-6,
            "loop.steps": 5000,
        },
    ),
    "distillm": Method(
        objective=objective(support="full", loss={"kind": "skew_reverse_kl", "alpha": 0.1}),
        phrase="skew reverse KL, bounded whatever the two distributions",
        source="DistiLLM, arXiv 2402.03898, SRKL with α = 0.1. Its schedule of new, replayed and given text is "
        "[rollout.adaptive]; validate_every is an epoch there. Not taken: its code's language-modelling loss on "
        "OpenWebText, and new text until the buffer is full.",
        signal="divergence",
        granularity="token",
        good_at="Students far from their teacher: mode-seeking, and no token makes the gradient explode.",
        trap="A larger α fades the gradient; 0.1 is about the optimum.",
        settings={
            "rollout.prompts_per_step": 8,
            "rollout.adaptive.rises": 10,
            "rollout.adaptive.tolerance": 0.1,
            "rollout.adaptive.capacity": 1000,
            "optim.lr": 5e-4,
            "optim.schedule": "cosine",
            "optim.weight_decay": 0.01,
            "optim.max_grad_norm": 1.0,
        },
    ),
    "distillm_forward": Method(
        objective=objective(support="full", loss={"kind": "skew_forward_kl", "alpha": 0.1}),
        phrase="skew forward KL, bounded whatever the two distributions",
        source="DistiLLM, arXiv 2402.03898, SKL with α = 0.1. Not taken: as of distillm; and its code logs the loss "
        "without the teacher's entropy, which is no divergence.",
        signal="divergence",
        granularity="token",
        good_at="Covering the teacher without the spikes of the forward KL, on data as on the student's text.",
        trap="A larger α fades the gradient as 1 − α.",
        settings={
            "rollout.prompts_per_step": 8,
            "rollout.adaptive.rises": 10,
            "rollout.adaptive.tolerance": 0.1,
            "rollout.adaptive.capacity": 1000,
            "optim.lr": 5e-4,
            "optim.schedule": "cosine",
            "optim.weight_decay": 0.01,
            "optim.max_grad_norm": 1.0,
        },
    ),
    "distillm2": Method(
        objective=objective(
            weight=0.5,
            over="others",
            support="full",
            loss={"kind": "skew_forward_kl", "alpha": 0.1},
            aggregation="sequence_mean",
            auxiliaries={
                "student": {
                    "weight": 0.5,
                    "over": "student",
                    "support": "full",
                    "loss": {"kind": "skew_reverse_kl", "alpha": 0.1},
                    "aggregation": "sequence_mean",
                }
            },
        ),
        phrase="skew forward KL on the teacher's text, skew reverse KL on the student's, half each",
        source="DistiLLM-2, arXiv 2503.07067, CALD. Not taken from its code: the mixture of the reverse part detached "
        "(detach_mixture = true). Off as there: the curriculum β (a ramp of both weights) and the adaptive α.",
        signal="divergence",
        granularity="token",
        good_at="Raising what the teacher writes and lowering what only the student does, without DPO's collapse.",
        trap="The two halves swapped teach the opposite; both texts of each prompt must be there.",
        settings={
            "rollout.beside": "teacher",
            "rollout.sampling.temperature": 0.8,
            "rollout.sampling.top_p": 0.95,
            "rollout.sampling.max_new_tokens": 1024,
            "rollout.max_prompt_tokens": 512,
            "student.lora.rank": 16,
            "student.lora.alpha": 128,
            "optim.lr": 5e-5,
        },
    ),
    "taid": Method(
        objective=objective(support="full", loss="forward_kl", target="taid"),
        phrase="forward KL to a target that moves from the student to the teacher as the loss falls",
        source="TAID, arXiv 2501.16937, §3.2 and algorithm 1. Its code compares cross-entropies where the paper's loss "
        "is the KL: the gradient is the same, t moves a little otherwise.",
        signal="divergence",
        granularity="token",
        good_at="A teacher far larger than the student, whose distribution the student cannot follow at once.",
        trap="At first it mostly matches itself (t = 0.4): small gradients early, which the schedule of lr must suit.",
        settings={"rollout.source": "reference", "rollout.prompts_per_step": 64, "optim.lr": 1e-4},
    ),
    "bd_kd": Method(
        objective=objective(support="full", loss="balanced_kl"),
        phrase="forward or reverse KL, as the student is surer or less sure than the teacher",
        source="after BD-KD, arXiv 2212.12965. Not taken: one of the two weights doubled by sample where here a "
        "sigmoid of the entropies' difference divides 1 by token; its cross-entropy; a teacher that trains along.",
        signal="divergence",
        granularity="token",
        good_at="Calibration: sharpens where the student is vague, widens where it is too sure.",
        trap="Its evidence is image classification.",
    ),
    "logit_standardised": Method(
        objective=objective(support="full", loss="forward_kl", target={"kind": "standardised", "temperature": 2.0}),
        phrase="forward KL of z-scored logits at temperature 2, times 4",
        source="Logit Standardization, arXiv 2403.01427. Not taken from its code: a deviation that divides by n − 1. "
        "Its weight of about 9 beside a cross-entropy is left to the run.",
        signal="divergence",
        granularity="token",
        good_at="Teachers whose logits have another scale than the student can reach.",
        trap="Absolute confidence is lost: bad for calibration, and it undoes swing; its evidence is images.",
    ),
    "pld": Method(
        objective=objective(
            over="others", support="full", loss={"kind": "plackett_luce", "weighted": True, "gold_first": True}
        ),
        phrase="likelihood that the student ranks tokens as the teacher does, the written one first",
        source="PLD, arXiv 2506.12542: the gold token, then the others by teacher logit, each rank weighted by the "
        "teacher's probability. Over the whole vocabulary, as printed.",
        signal="divergence",
        granularity="token",
        good_at="The teacher's order without its exact numbers, with the data's token always on top.",
        trap="A wrong token in the data is forced to rank 1: for verified text only, never for the student's own.",
        settings={"rollout.source": "reference"},
    ),
    "ps_kd": Method(
        objective=objective(
            over="others",
            support="full",
            loss="forward_kl",
            target={"kind": "one_hot_mix", "share": {"start": 0.0, "end": 0.8, "to_step": 1000}},
        ),
        phrase="likelihood softened by the student's own earlier predictions, up to four fifths of the target",
        source="PS-KD, arXiv 2006.12000: share 0.8 · progress. Its loss is the cross-entropy, with the same gradient. "
        "Not taken: predictions stored an epoch ago; a moving average of the weights stands in for them.",
        signal="divergence",
        granularity="token",
        good_at="Supervised learning without a teacher that does not grow too sure of itself.",
        trap="The share rises over target.share.to_step, which must be the run's steps; flat, it is plain likelihood.",
        settings={"rollout.source": "reference", "teacher.kind": "self", "teacher.weights": "ema"},
    ),
    "swing": Method(
        objective=objective(support="full", loss="forward_kl", target={"kind": "swing", "max_temperature": 4.0}),
        phrase="forward KL to a teacher that is hotter where a token is likely private",
        source="after Swing Distillation, arXiv 2212.08349, which publishes no formulas: T = 1 + 3π is this project's. "
        "Noise is off (target.noise); tokens that are surely private are heated, not dropped. π is 1 for "
        "tokens of what a line of the data lists as `private`, else 0: nothing is detected, and rarity is not counted.",
        signal="divergence",
        granularity="token",
        good_at="Teaching less of names and numbers that should not be learnt by heart.",
        trap="No formal privacy; names are recalled worse; z-scored logits undo it.",
    ),
    "dac_kl": Method(
        objective=objective(support={"kind": "nucleus", "mass": 0.95}, loss="forward_kl"),
        phrase="forward KL over the smallest set that holds 95% of the teacher's mass, both renormalised",
        source="DAC-KL of Multi-Granularity Semantic Revision, arXiv 2407.10068, with a fixed clip. Not taken: bounds "
        "that a network learns (the paper leaves it open), and the supervised and span losses. dac_kl_scrg has its "
        "rewriting of one token per text.",
        signal="divergence",
        granularity="token",
        good_at="Leaving the teacher's noisy tail out.",
        trap="The student's mass outside the set is free: nothing pulls it in.",
    ),
    "dac_kl_scrg": Method(
        objective=objective(support={"kind": "nucleus", "mass": 0.95}, loss="forward_kl"),
        phrase="dac_kl on the student's text after the teacher has replaced the token where they differ most",
        source="SCRG and DAC-KL of Multi-Granularity Semantic Revision, arXiv 2407.10068, one correction a text. The "
        "divergence that decides where is a lower bound: over the student's top rollout.revision_k and all else as "
        "one. Not taken: as of dac_kl; the buffer of earlier text.",
        signal="divergence",
        granularity="token",
        good_at="Text that one wrong token of a weak student would have led astray.",
        trap="Every text is written up to twice and read twice. Nobody sampled the token that the teacher put in: no "
        "method with importance weights can learn such text.",
        settings={"rollout.source": "revision"},
    ),
    "first": Method(
        objective=objective(
            support={"kind": "teacher_topk", "k": 5, "rest": "renorm"},
            loss="forward_kl",
            target={"kind": "tempered", "student": 1.0, "teacher": 1.0},
        ),
        phrase="forward KL to the teacher's renormalised top 5, at the temperature that calibrates it",
        source="FIRST, arXiv 2408.12168. Not taken from its code: a softmax of probabilities in place of log-probs, "
        "raw probabilities in a KL of logs with use_other_token, and a sum over tokens.",
        signal="divergence",
        granularity="token",
        good_at="A student whose confidence can be trusted, from five numbers a token.",
        trap="At target.teacher = 1 nothing is calibrated: set the T that fits held-out text. The tail is free.",
        settings={
            "rollout.source": "reference",
            "rollout.prompts_per_step": 128,
            "optim.lr": 2e-6,
            "optim.schedule": "cosine",
        },
    ),
    "random_sampling_kd": Method(
        objective=objective(support={"kind": "random_sampling", "draws": 50}, loss="forward_kl"),
        phrase="forward KL to 50 draws from the teacher: unbiased, tail included",
        source="Sparse Logit Sampling, arXiv 2503.16870, N = 50 at proposal temperature 1, without its optional "
        "cross-entropy. The value is higher than the KL by the entropy that a sample lacks.",
        signal="divergence",
        granularity="token",
        good_at="What 12 ids a token can carry of a whole distribution, where a top-k makes students over-confident.",
        trap="Unbiased for the forward KL alone.",
        settings={"rollout.source": "reference"},
    ),
    "random_sampling_hybrid": Method(
        objective=objective(support={"kind": "random_sampling", "draws": 42, "head": 8}, loss="forward_kl"),
        phrase="forward KL to the teacher's top 8 exactly and 42 draws from its tail: unbiased, less noise",
        source="after Sparse Logit Sampling, arXiv 2503.16870; the exact head is this project's, and lowers the "
        "variance 4.7 times on a Zipf(1.3) teacher",
        signal="divergence",
        granularity="token",
        good_at="Random_sampling_kd at the same budget with a fraction of its variance.",
        trap="Unbiased for the forward KL alone.",
        settings={"rollout.source": "reference"},
    ),
    "uld": Method(
        objective=objective(
            weight=1.5,
            support="full",
            loss="sorted_l1",
            auxiliaries={"supervised": {"over": "others", "loss": "likelihood"}},
        ),
        phrase="L1 distance of the sorted probabilities beside likelihood; a fallback where no token is shared",
        source="ULD, arXiv 2402.12030, with λ = 1.5 (KDFlow's default), mean over tokens. Not taken: pairing positions "
        "of texts that two tokenizers cut differently; teacher and student read the same tokens.",
        signal="divergence",
        granularity="token",
        good_at="Nothing that a KL cannot do better, unless the vocabularies differ.",
        trap="It compares shapes, not tokens: a teacher with its tokens permuted costs nothing.",
        settings={"rollout.source": "reference"},
    ),
}
