"""A teacher with another tokenizer: the same text is other tokens to it, so it scores pieces that end alike for both.

A piece that does not align, is too long or is no text counts for nothing.
"""

from __future__ import annotations

from potstill.methods.method import Method, objective

CROSS_TOKENIZER: dict[str, Method] = {
    "cross_tokenizer": Method(
        objective=objective(
            support="sampled",
            loss={"kind": "chunk_credit", "clamp": 10.0},
            over="student",
            correction={"kind": "clipped", "low": 0.2, "high": 0.28},
        ),
        phrase="on-policy distillation from a teacher with another tokenizer, sampled-token policy gradient",
        source="arXiv 2606.09456: A = (L_T / L_S − 1) log q, |A| at most 10, chunks of at most 6 tokens on a side, and "
        "PPO's clip, whose ratio is to the sampler",
        signal="sampled",
        granularity="hybrid",
        good_at="Any teacher that can say the log-prob of a given text, whatever its family.",
        trap="Blame is shared out by surprise: of a chunk that the teacher dislikes it falls on the student's least "
        "likely token, whichever token is at fault.",
        settings={
            "optim.lr": 1e-6,
            "optim.warmup_steps": 10,
            "rollout.prompts_per_step": 128,
            "rollout.samples_per_prompt": 1,
            "rollout.sampling.temperature": 1.0,
            "rollout.sampling.max_new_tokens": 16384,
        },
    ),
    "alm": Method(
        objective=objective(
            support="sampled",
            loss={"kind": "chunk_likelihood", "temperature": 100.0},
            over="others",
            aggregation="sequence_mean",
            auxiliaries={"text": {"loss": "likelihood", "over": "others"}},
        ),
        phrase="likelihoods of pieces of given text as the teacher's, across tokenizers, and the text's likelihood",
        source="ALM, arXiv 2503.20083, τ = 100, without its debiasing of chunk ends; the mean over each completion's "
        "chunks, where the paper's is over the batch's. Equal weights of the two losses are the project's",
        signal="sampled",
        granularity="hybrid",
        good_at="Moving a model to another tokenizer, or a first stage on text that is there already.",
        trap="At τ = 100 its slope is small where chunks are improbable: watch loss_main beside loss_text.",
        settings={
            "rollout.source": "reference",
            "rollout.prompts_per_step": 64,
            "optim.lr": 1e-5,
            "optim.warmup_steps": 2000,
            "student.lora.rank": 64,
        },
    ),
    "cross_tokenizer_hybrid": Method(
        objective=objective(
            support={"kind": "teacher_topk", "k": 16},
            loss={"kind": "jsd", "beta": 0.5},
            over="student",
            gates=["aligned_one_to_one"],
            auxiliaries={
                "spans": {"over": "student", "loss": "chunk_likelihood", "gates": ["aligned_span"]},
            },
        ),
        phrase="JSD over the teacher's top-k where one token is one token to both, chunk likelihoods elsewhere",
        source="after TRL's GOLD and its hybrid ULD loss, mended: ids are matched by bytes, what has no match goes to "
        "the tail, and ALM (arXiv 2503.20083) takes the place of sorted probabilities. k and the weights are the "
        "project's",
        signal="divergence",
        granularity="hybrid",
        good_at="Tokenizers that agree on most of the text: there it is as little noisy as a shared vocabulary.",
        trap="A teacher's entry without an equal among the student's tokens is a part of the tail: what the student "
        "would spell in two tokens is not told apart.",
        settings={"rollout.sampling.temperature": 0.9, "rollout.sampling.top_p": 0.95},
    ),
}
