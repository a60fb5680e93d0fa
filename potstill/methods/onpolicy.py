"""On-policy distillation from a stronger teacher: the student writes, the teacher scores every token.

A weight that a paper does not print is the project's own, and its source says so.
"""

from __future__ import annotations

from potstill.methods.method import Method, objective

ON_POLICY: dict[str, Method] = {
    "opd": Method(
        objective=objective(support={"kind": "student_topk", "k": 16}, loss="reverse_kl", over="student"),
        phrase="on-policy distillation, exact reverse KL over the student's top-k and a tail bucket",
        source="GKD with λ = 1 and D = reverse KL (arXiv 2306.13649), over the top-k and tail of SDPO "
        "(arXiv 2601.20802), whose mean over tokens it takes; GKD averages each completion first. k = 16 is the "
        "project's",
        signal="divergence",
        granularity="token",
        good_at="The default: nearly the whole divergence for 16 numbers a token, from a teacher behind HTTP.",
        trap="What lies outside the top-k is matched in sum only; watch captured_mass.",
        settings={"rollout.sampling.temperature": 1.0},
    ),
    "opd_full": Method(
        objective=objective(support="full", loss="reverse_kl", over="student"),
        phrase="on-policy distillation, exact reverse KL over the vocabulary",
        source="GKD with λ = 1 and D = reverse KL (arXiv 2306.13649), but the mean over all tokens of the step; "
        "Qwen3 (arXiv 2505.09388) names neither direction nor support of its KL",
        signal="divergence",
        granularity="token",
        good_at="The least noise that a reverse KL can have, and the measure of every cheaper support.",
        trap="Reverse KL loses diversity: pass@k may fall while pass@1 rises.",
        settings={"rollout.sampling.temperature": 1.0},
    ),
    "opd_sampled": Method(
        objective=objective(
            support="sampled",
            loss="policy_gradient",
            over="student",
            correction={"kind": "truncated", "cap": 5.0},
        ),
        phrase="on-policy distillation, sampled-token policy gradient; the least a teacher must offer",
        source="Thinking Machines 2025, with the advantage under the current student (arXiv 2606.24143) and G-OPD's "
        "token TIS 5 (arXiv 2602.12125)",
        signal="sampled",
        granularity="token",
        good_at="Any teacher that can say the log-prob of a given token.",
        trap="One number a token is a noisy gradient: take more completions or a smaller learning rate than for opd.",
        settings={"rollout.sampling.temperature": 1.0},
    ),
    "thinking_machines": Method(
        objective=objective(
            support="sampled",
            loss={"kind": "policy_gradient", "student": "sampler"},
            over="student",
            correction="unclipped",
            aggregation="sequence_sum",
        ),
        phrase="the tinker cookbook's own loss: the sampler's log-probs in the advantage, no clip, a sum over tokens",
        source="Thinking Machines 2025, as its cookbook has it; the cookbook's sum over the batch is this times the "
        "number of completions. arXiv 2606.24143 shows the bias of its advantage. Without LoRA its lr is 5e-5",
        signal="sampled",
        granularity="token",
        good_at="Comparing with published cookbook runs.",
        trap="Newer weights than the text's bias the advantage, and nothing bounds the ratio: loop.max_staleness = 0.",
        settings={
            "student.lora.rank": 128,
            "optim.lr": 1e-4,
            "rollout.prompts_per_step": 1024,
            "rollout.samples_per_prompt": 4,
            "rollout.sampling.temperature": 1.0,
            "rollout.sampling.max_new_tokens": 4096,
        },
    ),
    "g_opd": Method(
        objective=objective(
            support="sampled",
            loss={"kind": "policy_gradient", "extrapolation": 1.0},
            over="student",
            correction={"kind": "truncated", "cap": 5.0},
        ),
        phrase="generalised OPD at λ = 1, where it is plain OPD; move λ to trust teacher or reference more",
        source="G-OPD, arXiv 2602.12125, A = λ log p − log q + (1 − λ) log ref with token TIS 5",
        signal="sampled",
        granularity="token",
        good_at="The control of exopd: the same run without extrapolation.",
        trap="As it stands it is opd_sampled; the reference is read only when loss.extrapolation is not 1.",
        settings={
            "optim.lr": 1e-5,
            "rollout.prompts_per_step": 1024,
            "rollout.samples_per_prompt": 1,
            "rollout.sampling.temperature": 1.0,
            "rollout.sampling.max_new_tokens": 16384,
        },
    ),
    "exopd": Method(
        objective=objective(
            support="sampled",
            loss={"kind": "policy_gradient", "extrapolation": 1.25},
            over="student",
            correction={"kind": "truncated", "cap": 5.0},
        ),
        phrase="OPD past the teacher: λ = 1.25 goes on in the direction from the reference to it",
        source="ExOPD, arXiv 2602.12125, λ = 1.25 with token TIS 5; the reference is the student as the run found it, "
        "not the teacher's own base (its reward correction)",
        signal="sampled",
        granularity="token",
        good_at="A teacher that was trained from a relative of the student: the optimum is ref^(1−λ) p^λ.",
        trap="λ amplifies whatever tells teacher and reference apart, length and noise too.",
        settings={
            "optim.lr": 1e-5,
            "rollout.prompts_per_step": 1024,
            "rollout.samples_per_prompt": 1,
            "rollout.sampling.temperature": 1.0,
            "rollout.sampling.max_new_tokens": 16384,
        },
    ),
    "eopd": Method(
        objective=objective(
            support="sampled",
            loss="policy_gradient",
            over="student",
            correction="clipped",
            auxiliaries={
                "cover": {
                    "weight": 1.0,
                    "over": "student",
                    "support": {"kind": "teacher_topk", "k": 16, "rest": "partial"},
                    "loss": "forward_kl",
                    "gates": [{"kind": "teacher_entropy_above", "nats": 0.8}],
                }
            },
        ),
        phrase="clipped sampled reverse KL and, where the teacher is unsure, a forward KL over its top-16 as well",
        source="Entropy-aware OPD, arXiv 2603.07079: a sum, not a switch, over all tokens; its weight α = 1 and the "
        "clip of 0.2 are the project's; the ratio is to the sampler",
        signal="divergence",
        granularity="token",
        good_at="Keeping the student's diversity where the teacher has several ways on.",
        trap="Without the tail the forward KL pulls all mass into the teacher's top-16; the threshold is in nats.",
    ),
    "lsm": Method(
        objective=objective(
            support={"kind": "teacher_topk", "k": 32, "rest": "renorm"}, loss="reverse_kl", over="student"
        ),
        phrase="local support matching: reverse KL over the teacher's top-32, both sides scaled to 1",
        source="Revisiting OPD, arXiv 2603.25562, mean over tokens, as the paper: a part of its code makes −KL an "
        "advantage. The paper's mask of a special token's first occurrence is left out",
        signal="divergence",
        granularity="token",
        good_at="Text on which single tokens would otherwise rule the loss; a teacher that only offers its own top-k.",
        trap="Nothing holds the mass outside the top-k: without rollout.sampling.top_p = 0.9 it is worse than sampled "
        "(AIME24: 17.7 against 20.4; with it 23.6).",
        settings={
            "optim.lr": 1e-6,
            "rollout.samples_per_prompt": 8,
            "rollout.sampling.top_p": 0.9,
            "rollout.sampling.max_new_tokens": 16384,
        },
    ),
    "vopd": Method(
        objective=objective(support="sampled", loss={"kind": "policy_gradient", "baseline": "kl"}, over="student"),
        phrase="sampled-token policy gradient with its mean, the exact KL, as a baseline",
        source="vOPD, arXiv 2605.07865, A + KL(q‖p) over the vocabulary",
        signal="sampled",
        granularity="token",
        good_at="The same gradient on average, usually of less variance.",
        trap="It needs the whole vocabulary, from which opd_full takes no samples at all; less is not guaranteed.",
    ),
    "power_opd": Method(
        objective=objective(
            support="sampled", loss={"kind": "policy_gradient", "score": "power", "exponent": 5.0}, over="student"
        ),
        phrase="sampled-token policy gradient with a bounded score, p⁵ − q⁵",
        source="PowerOPD, arXiv 2606.17199, α = 5",
        signal="sampled",
        granularity="token",
        good_at="Runs that a few tokens of huge log-ratio would otherwise blow up.",
        trap="Tokens that both sides find unlikely teach almost nothing: p⁵ − q⁵ vanishes with them.",
        settings={"optim.lr": 5e-7},
    ),
    "iw_opd": Method(
        objective=objective(
            support="sampled",
            loss="policy_gradient",
            over="student",
            gates=[{"kind": "early_weight", "gamma": 0.5}],
        ),
        phrase="sampled-token policy gradient in which early tokens count up to half as much again",
        source="IW-OPD, arXiv 2606.22600, γ = 0.5",
        signal="sampled",
        granularity="token",
        good_at="Long answers, whose late tokens a teacher judges on a prefix that it would not have written.",
        trap="Weights exceed 1, so the step is larger than opd_sampled's at the same learning rate.",
        settings={"optim.lr": 1e-5, "rollout.prompts_per_step": 1024, "rollout.samples_per_prompt": 1},
    ),
    "stable_opd": Method(
        objective=objective(
            support="sampled",
            loss="policy_gradient",
            over="student",
            correction={"kind": "truncated", "cap": 5.0},
            auxiliaries={
                "gold": {"weight": 0.1, "over": "others", "loss": "likelihood"},
                "anchor": {
                    "weight": 0.01,
                    "over": "student",
                    "against": "reference",
                    "support": "full",
                    "loss": "reverse_kl",
                },
            },
        ),
        phrase="opd_sampled held by two anchors: likelihood of gold text, and KL to the student as it was",
        source="Stable-OPD, arXiv 2604.08527, L + λ SFT(gold) + β KL(q‖ref); λ = 0.1 and β = 0.01 are the project's",
        signal="sampled",
        granularity="hybrid",
        good_at="Runs that would end in longer and longer, repeating answers.",
        trap="The anchors hold the student where it was, or where the gold text is: too strong, and it stays there.",
        settings={
            "optim.lr": 1e-6,
            "rollout.prompts_per_step": 64,
            "rollout.samples_per_prompt": 4,
            "rollout.beside": "reference",
        },
    ),
    "tsd_kd": Method(
        objective=objective(
            support="full",
            loss={"kind": "jsd", "beta": 0.9},
            over="student",
            gates=["entropy_gap"],
            auxiliaries={
                "ranking": {
                    "weight": 0.1,
                    "over": "student",
                    "support": {"kind": "student_topk", "k": 10, "rest": "renorm"},
                    "loss": "plackett_luce",
                    "gates": [{"kind": "opener", "share": 0.1}],
                },
                "certainty": {
                    "weight": 1.0,
                    "over": "student",
                    "support": "full",
                    "loss": "entropy",
                    "gates": [{"kind": "student_entropy_top", "share": 0.1}],
                },
            },
        ),
        phrase="token-selective: JSD where the teacher is surer, its ranking at the opening, entropy at forks",
        source="TSD-KD, arXiv 2603.13260, as the paper: its code ranks by a prefix, keeps 90 % of the entropies and "
        "cuts the opening over the flattened batch. The gate's τ = 1 is the project's",
        signal="divergence",
        granularity="token",
        good_at="Reasoning by a small student, which may keep its own words.",
        trap="The entropy term sharpens without asking the teacher: too long a run ends in repetition.",
        settings={
            "optim.lr": 5e-6,
            "rollout.prompts_per_step": 16,
            "rollout.sampling.temperature": 1.0,
            "rollout.sampling.max_new_tokens": 1024,
        },
    ),
    "async_opd": Method(
        objective=objective(
            support={"kind": "samples", "m": 64}, loss="policy_gradient", over="student", correction="unclipped"
        ),
        phrase="64 draws at every position, each with its own ratio: stale text, exact actions",
        source="AsyncOPD, arXiv 2606.24143, advantage under the current student, no clip; m = 64 has 1.5 % of "
        "one draw's variance. Its draws are beside the written token, which no term reads",
        signal="sampled",
        granularity="token",
        good_at="Generation that runs far ahead of training.",
        trap="It corrects what was drawn at a prefix, not the prefix, which stays as stale as the text.",
    ),
    "early_stop": Method(
        objective=objective(
            support={"kind": "student_topk", "k": 16},
            loss="reverse_kl",
            over="student",
            gates=[{"kind": "window", "last": 100}],
        ),
        phrase="opd on the first 100 tokens of each answer",
        source="Early stopping rollouts, arXiv 2605.27028, N = 100; its reverse KL here over top-k and tail",
        signal="divergence",
        granularity="token",
        good_at="Many more prompts for the same tokens; a teacher of another family, who loses the thread later on.",
        trap="Let rollout.sampling.max_new_tokens be 100 too: longer answers cost as much, and dilute the mean.",
        settings={"rollout.sampling.max_new_tokens": 100},
    ),
    "paced": Method(
        objective=objective(
            support="full", loss="forward_kl", over="others", gates=["pass_rate"], aggregation="sequence_mean"
        ),
        phrase="forward KL on the teacher's or the data's text, prompts weighted by p(1 − p) of their pass rate",
        source="PACED, arXiv 2603.11178 v3, a = b = 1, mean weight 1 over the step's texts; pass rates smoothed by "
        "Laplace's rule, without which few samples give 0 or 1",
        signal="divergence",
        granularity="hybrid",
        good_at="Prompts at the edge of what the student can do, whose gradient has the most signal in its noise.",
        trap="Off-policy: the student never sees its own mistakes; paced_two_stage goes on with them.",
        settings={
            "optim.lr": 1e-6,
            "rollout.prompts_per_step": 256,
            "rollout.beside": "reference",
            "rollout.sampling.max_new_tokens": 16384,
        },
    ),
    "paced_two_stage": Method(
        objective=objective(
            weight={"start": 1.0, "end": 0.0, "from_step": 100, "to_step": 101},
            support="full",
            loss="forward_kl",
            over="others",
            gates=["pass_rate"],
            aggregation="sequence_mean",
            auxiliaries={
                "own_text": {
                    "weight": {"start": 0.0, "end": 1.0, "from_step": 100, "to_step": 101},
                    "over": "student",
                    "support": "full",
                    "loss": "reverse_kl",
                    "gates": ["pass_rate"],
                    "aggregation": "sequence_mean",
                }
            },
        ),
        phrase="paced, then reverse KL on the student's own text: first cover, then choose",
        source="PACED, arXiv 2603.11178, forward then reverse KL, its best schedule; the switch after step 100 is the "
        "project's",
        signal="divergence",
        granularity="hybrid",
        good_at="A student too far from its teacher to start on its own text.",
        trap="Both ramps switch after step 100 whatever loop.steps is: move them together.",
        settings={
            "optim.lr": 1e-6,
            "rollout.prompts_per_step": 256,
            "rollout.beside": "reference",
            "rollout.sampling.max_new_tokens": 16384,
        },
    ),
    "veto": Method(
        objective=objective(support="full", loss="forward_kl", over="student", target={"kind": "bridge", "beta": 0.5}),
        phrase="forward KL to a bridge between teacher and student, p · q^β",
        source="Veto, arXiv 2601.07155; β = 0.5 and the choice of its forward KL are the project's",
        signal="divergence",
        granularity="token",
        good_at="A weak student: what it finds impossible it is not yet pushed towards.",
        trap="It ends at q ∝ p^(1/(1 − β)), sharper than the teacher; from β = 1 on there is no end but one token.",
    ),
}
