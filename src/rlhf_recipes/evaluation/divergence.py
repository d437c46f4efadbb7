"""How far a policy has moved from its reference, estimated on the policy's own samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_recipes.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def sequence_kl(log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """Two estimates of KL(policy || reference), in nats (Schulman 2020, "Approximating KL divergence").

    All three tensors are `(sequences, tokens)`: log-probabilities that policy and reference give to tokens the *policy*
    sampled, and a mask that is true where a token counts. What lies under the mask, NaN included, changes nothing.

    - `kl`: mean over sequences of the summed log ratio (k1): unbiased, negative on an unlucky sample.
    - `kl_per_token_k3`: mean over tokens of exp(-r) - 1 + r with r the log ratio (k3): never negative, less noisy.
    """
    import torch

    kept = mask.bool()
    if not kept.any():
        raise UserError("KL of no tokens; at least one generated token is needed")
    ratio = torch.where(kept, log_probs.float() - reference_log_probs.float(), 0.0).double()
    k3 = torch.expm1(-ratio) + ratio
    return {"kl": ratio.sum(dim=1).mean().item(), "kl_per_token_k3": (k3.sum() / kept.sum()).item()}
