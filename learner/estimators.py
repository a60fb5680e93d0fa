"""Losses that see only the sampled token. Pure tensors, [N] in, [N] out, in nats.

Named by their gradient: `sampled_reverse_kl` has the gradient of KL(q‖p), whatever its value. Differentiating the
k1 estimate log q − log p itself would not learn at all (its gradient has zero mean), nor would k3 without the ratio
(its gradient is that of the forward KL).
"""

from __future__ import annotations

from torch import Tensor


def sampled_reverse_kl(logq: Tensor, logp: Tensor, log_behaviour: Tensor, *, ratio_cap: float | None) -> Tensor:
    """−ρ·A with ρ = q/μ and A = log p − log q detached, for tokens drawn from μ.

    E_μ of the gradient is ∇KL(q‖p) for any μ with support, because the advantage is that of the *current* student; with
    the sampler's log-probs in A it would hold for μ = q alone (arXiv 2606.24143; algorithms §0). A ratio above
    `ratio_cap` is truncated (TIS), which trades bias for variance; None leaves the estimate unbiased.

    logq       [N] student now, with gradient
    logp       [N] teacher
    log_behaviour  [N] student when it sampled, from the sampler itself
    """
    ratio = (logq - log_behaviour).detach().exp()
    if ratio_cap is not None:
        ratio = ratio.clamp(max=ratio_cap)
    advantage = (logp - logq).detach()
    return -(ratio * advantage) * (1 + logq - logq.detach())


def negative_log_likelihood(logq: Tensor) -> Tensor:
    """−log q of the written token."""
    return -logq
