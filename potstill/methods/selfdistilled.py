"""Self-distillation: the student's own weights, reading what the student does not see, are its teacher."""

from __future__ import annotations

from potstill.methods.method import Method, objective

_OPSD_RUN = {
    "teacher.weights": "frozen",
    "student.lora.rank": 64,
    "student.lora.alpha": 128,
    "rollout.prompts_per_step": 32,
    "rollout.samples_per_prompt": 1,
    "rollout.sampling.top_p": 0.95,
    "rollout.sampling.top_k": 20,
}

SELF_DISTILLED: dict[str, Method] = {
    "opsd": Method(
        objective=objective(
            support="full",
            loss={"kind": "forward_kl", "pointwise_clip": 0.05},
            over="student",
            aggregation="sequence_mean",
        ),
        phrase="self-distillation from a privileged prompt, forward KL over the vocabulary with a pointwise clip",
        source="OPSD, arXiv 2601.18734 v3, full-vocabulary loss with τ = 0.05 (its 1.7B; 8B: 0.06). Not taken from "
        "the code: logits over the sampling temperature (target.tempered does that), the batch's tokens as normaliser",
        signal="divergence",
        granularity="token",
        context="privileged",
        good_at="Worked solutions and no stronger teacher: dense credit from one rollout a prompt.",
        trap="Without the clip tokens of style outweigh those of reasoning, and the student collapses. A clipped "
        "outcome is pushed slightly down: loss.zero_sum stops that.",
        settings=_OPSD_RUN,
    ),
    "opsd_jsd": Method(
        objective=objective(
            support="full", loss={"kind": "jsd", "beta": 0.5}, over="student", aggregation="sequence_mean"
        ),
        phrase="self-distillation from a privileged prompt, Jensen-Shannon divergence over the vocabulary",
        source="OPSD, arXiv 2601.18734 v1, full-vocabulary loss; the paper's v3 gave it up for the clipped forward KL",
        signal="divergence",
        granularity="token",
        context="privileged",
        good_at="A bounded loss: no token counts more than log 2, however sure the solution makes the teacher.",
        trap="Where student and teacher share nothing the gradient fades; the paper scores it below the forward KL.",
        settings=_OPSD_RUN | {"optim.lr": 1e-5, "optim.schedule": "cosine"},
    ),
    "opsd_reverse": Method(
        objective=objective(support="full", loss="reverse_kl", over="student", aggregation="sequence_mean"),
        phrase="self-distillation from a privileged prompt, reverse KL over the vocabulary",
        source="OPSD, arXiv 2601.18734, the reverse-KL row of its ablation; per-sequence mean as in its equation",
        signal="divergence",
        granularity="token",
        context="privileged",
        good_at="A student that should drop its wrong ways rather than learn every way of the teacher.",
        trap="Mode seeking: what the student finds unlikely it never learns; the paper scores it below forward KL.",
        settings=_OPSD_RUN,
    ),
    "opsd_sampled": Method(
        objective=objective(support="sampled", loss="policy_gradient", over="student", aggregation="sequence_mean"),
        phrase="self-distillation from a privileged prompt, policy gradient of the sampled token",
        source="OPSD, arXiv 2601.18734, sampled-token loss; its advantage is under the current student",
        signal="sampled",
        granularity="token",
        context="privileged",
        good_at="A privileged teacher behind HTTP, or a vocabulary whose logits do not fit.",
        trap="A noisy gradient: the paper finds it 2 to 3 points of pass@8 below the full vocabulary.",
        settings=_OPSD_RUN,
    ),
    "sdpo": Method(
        objective=objective(
            support={"kind": "student_topk", "k": 100},
            loss={"kind": "jsd", "beta": 0.5},
            over="student",
            correction={"kind": "truncated", "cap": 2.0},
        ),
        phrase="RL via self-distillation: JSD over the student's top-100 and a tail, teacher reads what worked",
        source="SDPO, arXiv 2601.20802, practical loss with α = 0.5 (generalisation). Its other teacher: "
        'teacher.weights = "trust_region". Its two capped ratios, to π_old '
        "and to the sampler, are one here, q/μ: they coincide with its one gradient step per batch",
        signal="divergence",
        granularity="token",
        context="privileged",
        good_at="Verifiable tasks: a verdict for every token where a reward alone is one number a completion.",
        trap="The context is the data's answer or solution: completions without a solved sibling are not left out. "
        "Weak bases do better with grpo; a live teacher diverges.",
        settings={
            "teacher.weights": "ema",
            "teacher.ema_decay": 0.95,
            "rollout.prompts_per_step": 32,
            "rollout.samples_per_prompt": 8,
            "rollout.max_prompt_tokens": 2048,
            "rollout.sampling.max_new_tokens": 8192,
            "optim.lr": 1e-5,
        },
    ),
    "sdpo_rich": Method(
        objective=objective(
            support={"kind": "student_topk", "k": 20},
            loss="reverse_kl",
            over="student",
            correction={"kind": "truncated", "cap": 2.0},
        ),
        phrase="SDPO for rich feedback: reverse KL over the student's top-20 and a tail",
        source="SDPO, arXiv 2601.20802, α = 1 with the numbers of its LiveCodeBench runs; one ratio, as in sdpo",
        signal="divergence",
        granularity="token",
        context="privileged",
        good_at="Environments that say what went wrong, such as failing tests of code.",
        trap="The context is the data's answer or solution: feedback on the attempt itself is not brought to the "
        "teacher. Answers shrink about threefold: watch their length.",
        settings={
            "teacher.weights": "ema",
            "teacher.ema_decay": 0.99,
            "rollout.prompts_per_step": 32,
            "rollout.samples_per_prompt": 8,
            "rollout.max_prompt_tokens": 2048,
            "rollout.sampling.max_new_tokens": 8192,
            "optim.lr": 1e-6,
        },
    ),
    "sdft": Method(
        objective=objective(
            support="full",
            loss="reverse_kl",
            over="student",
            gates=[{"kind": "window", "first": 3}],
            aggregation="sequence_sum",
        ),
        phrase="continual learning from demonstrations: reverse KL to the student that has read one",
        source="SDFT, arXiv 2601.19897: Σ_t of the reverse KL, 3 first tokens skipped as in its code. Not taken: the "
        "ports' top-k (TRL: student_topk 100; tinker: the teacher's top 20, a forward KL) and TRL's ratio cap of 2",
        signal="divergence",
        granularity="token",
        context="privileged",
        good_at="New skills from demonstrations with less forgetting than supervised tuning on them.",
        trap='A small model parrots "based on the example"; and sums of long completions are cut by '
        "optim.max_grad_norm: then aggregation token_mean.",
        settings={"teacher.weights": "ema", "teacher.ema_decay": 0.99},
    ),
    "opcd": Method(
        objective=objective(
            support={"kind": "student_topk", "k": 256, "rest": "partial"},
            loss="reverse_kl",
            over="student",
            aggregation="sequence_mean",
        ),
        phrase="context distillation on-policy: reverse KL over the student's top-256, rest left out",
        source="OPCD, arXiv 2602.12275, per-sequence mean over the student's top-256 without renormalising, as there",
        signal="divergence",
        granularity="token",
        context="privileged",
        good_at="Making a long system prompt, or distilled experience, part of the weights.",
        trap='Left-out mass pulls the top-k down to 1/e of the teacher\'s mass: prefer support.rest = "tail". '
        "Even a perfect student has a gradient. Raw traces as context hurt; a teacher that follows the student fails.",
        settings={
            "teacher.weights": "frozen",
            "rollout.prompts_per_step": 128,
            "rollout.samples_per_prompt": 1,
            "rollout.sampling.temperature": 0.6,
            "rollout.sampling.max_new_tokens": 16384,
            "optim.lr": 5e-6,
            "loop.steps": 50,
        },
    ),
    "skill_sd": Method(
        objective=objective(
            support="sampled",
            loss={"kind": "policy_gradient", "distil": 0.0, "reward": 1.0},
            over="student",
            correction="clipped",
            auxiliaries={
                "teacher": {"support": "sampled", "loss": "ratio_k3", "over": "student", "weight": 0.001},
            },
        ),
        phrase="GRPO, and a light ratio-weighted k3 towards the student that reads a skill",
        source="Skill-SD, arXiv 2604.10674: GRPO + λ · mean ρ k3, λ = 0.001. |ℓ| is clamped at 20",
        signal="reward",
        granularity="token",
        context="privileged",
        good_at="Agents: reward says what succeeded, skills say which steps made it so.",
        trap="λ = 0.01 destabilises. Skills are the data's solution here: nobody writes one after a rollout or picks "
        "the best for a task. A student that reads the skill itself comes to depend on it.",
        settings={"teacher.weights": "live"},
    ),
}
