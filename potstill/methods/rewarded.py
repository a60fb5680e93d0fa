"""Distillation beside a reward, or by one that a discriminator or a preference makes."""

from __future__ import annotations

from potstill.methods.method import Method, objective

_REWARD = {
    "support": "sampled",
    "loss": {"kind": "policy_gradient", "distil": 0.0, "reward": 1.0},
    "over": "student",
    "correction": {"kind": "clipped", "low": 0.2, "high": 0.2},
    "aggregation": "sequence_mean",
}
"""GRPO without its KL: what the methods here add to."""

_AFTER_TEN_STEPS = {"start": 0.0, "end": 1.0, "from_step": 10, "to_step": 11}

_PENALISED = _REWARD | {
    "loss": {"kind": "policy_gradient", "distil": 0.0, "reward": 1.0, "kl_penalty": 0.25, "near": "own_prompt"}
}

REWARDED: dict[str, Method] = {
    "grpo": Method(
        objective=objective(**_REWARD),
        phrase="the reward alone: clipped policy gradient on group-normalised rewards, no teacher",
        source="GRPO, DeepSeekMath, arXiv 2402.03300, eq. 3 without its KL to the reference",
        signal="reward",
        granularity="sequence",
        good_at="The control of every method with a reward.",
        trap="Groups that all fail or all succeed teach nothing; deviation and length both bias what counts.",
    ),
    "kdrl": Method(
        objective=objective(
            **_REWARD,
            auxiliaries={
                "teacher": {
                    "support": "sampled",
                    "loss": "k2",
                    "over": "student",
                    "weight": 0.002,
                    "aggregation": "sequence_mean",
                }
            },
        ),
        phrase="reward and a stronger teacher at once: GRPO with k2 to the teacher",
        source="KDRL, arXiv 2506.02208: J_GRPO − β k2, β = 2e-3; annealed 5e-3 → 1e-3 by a ramp as the weight. "
        "Not taken: k1 as a loss, as a port has it, which does not learn",
        signal="reward",
        granularity="token",
        good_at="A teacher that is better but not right, and a verifier that knows.",
        trap="k2 is the reverse KL's gradient only on-policy: with stale text use loss ratio_k3.",
    ),
    "rlsd": Method(
        objective=objective(**_REWARD, gates=[{"kind": "evidence", "clip": 0.2}]),
        phrase="the reward says which way, the student with the solution says how much at each token",
        source="RLSD, arXiv 2604.03128: Â = A · clip((p/q)^sign(A), 1 − ε, 1 + ε) inside PPO's clip. "
        "ε = 0.2 is this project's: the paper's own was not recovered",
        signal="reward",
        granularity="token",
        context="privileged",
        good_at="Credit for tokens that a privileged teacher cannot turn against the verdict: nothing leaks.",
        trap="Nothing to learn where the whole group agrees, whatever the teacher knows.",
    ),
    "rl_opsd": Method(
        objective=objective(
            **_REWARD,
            auxiliaries={
                "teacher": {
                    "support": "sampled",
                    "loss": "ratio_k3",
                    "over": "student",
                    "weight": 0.25,
                    "aggregation": "sequence_mean",
                }
            },
        ),
        phrase="reward and KL to the student itself with privileged information; the student writes",
        source="RL-OPSD, arXiv 2602.04942: E[R] − β KL(π_S ‖ sg π_T), β = 0.25, the KL as ρ k3",
        signal="reward",
        granularity="token",
        context="privileged",
        good_at="Privileged information beside a verifier, on text that the student will really write.",
        trap="Where the two prompts lead far apart at first the KL outweighs the reward.",
        settings={"teacher.weights": "live"},
    ),
    "pi_distill": Method(
        objective=objective(
            **_PENALISED,
            weight=0.5,
            auxiliaries={
                "teacher": _PENALISED | {"over": "privileged", "weight": 0.5},
                "follow": {
                    "support": "sampled",
                    "loss": "likelihood",
                    "over": "student",
                    "weight": 0.125,
                    "aggregation": "sequence_mean",
                },
            },
        ),
        phrase="the student writes with privileged information and learns the text under both prompts",
        source="π-Distill, arXiv 2602.04942: α J_T + (1 − α) J_S, α = 0.5, β = 0.25, practical form. J_T's KL is the "
        "penalty in the reward, which both terms share; J_S's KL(sg π_T ‖ π_S) is a likelihood of weight (1 − α) β",
        signal="reward",
        granularity="token",
        context="privileged",
        good_at="Tasks that the student never solves unaided: privileged text finds rewards, both views learn them.",
        trap="A large KL between the prompts at the start foretells failure; watch for leaked words such as “hint”.",
        settings={"rollout.view": "privileged"},
    ),
    "gad": Method(
        objective=objective(
            **_REWARD | {"loss": {"kind": "policy_gradient", "distil": 0.0, "reward": _AFTER_TEN_STEPS}},
            judge="discriminator",
            auxiliaries={
                "reference": {
                    "support": "sampled",
                    "loss": "ratio_k3",
                    "over": "student",
                    "against": "reference",
                    "weight": 0.001,
                    "aggregation": "sequence_mean",
                }
            },
        ),
        phrase="black-box: the reward is a discriminator's that learns to tell student from teacher",
        source="GAD, arXiv 2511.10643; its discriminator learns alone for 10 steps, after which it has a say. Numbers "
        "are those of the code. Not taken from it: a low-variance KL that is k3 without ρ, whose gradient is the "
        "forward KL's; and a first epoch of SFT in which the discriminator learns too: run sft, then this",
        signal="reward",
        granularity="sequence",
        good_at="A teacher of which only text can be had.",
        trap="A discriminator that stands still is hacked within some 300 steps: answers grow without end.",
        settings={
            "rollout.beside": "teacher",
            "rollout.prompts_per_step": 256,
            "rollout.samples_per_prompt": 8,
            "rollout.max_prompt_tokens": 2048,
            "rollout.sampling.temperature": 0.8,
            "rollout.sampling.max_new_tokens": 1536,
            "optim.lr": 1e-6,
            "optim.max_grad_norm": 0.2,
        },
    ),
    "ranked_preference": Method(
        objective=objective(
            support="sampled",
            loss={"kind": "preference", "beta": 0.1, "pairs": "best_over_worst"},
            over="student",
            aggregation="sequence_sum",
        ),
        phrase="preference for the best of the student's own answers over the worst, as they were ranked",
        source="OAIF, arXiv 2402.04792: online DPO on answers that a model ranks, there two a prompt; the indirect "
        "half of TSD-KD, arXiv 2603.13260, with whole answers for candidates. Any reward ranks. β = 0.1 is DPO's",
        signal="preference",
        granularity="sequence",
        good_at="A teacher that compares answers better than it writes them; rewards of which only the order is meant.",
        trap="All that lies between best and worst is thrown away, and a ranking that likes length makes answers long.",
        settings={"rollout.samples_per_prompt": 2},
    ),
}
