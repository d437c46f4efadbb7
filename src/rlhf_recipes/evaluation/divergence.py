"""The KL divergence of a policy from its reference model, estimated on samples of the policy."""

import torch
from torch import Tensor

from rlhf_recipes.core.errors import UserError


def sequence_kl(log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """Compute two estimates of KL(policy || reference), in nats (Schulman 2020, "Approximating KL divergence").

    Returns:
        `kl`: mean over sequences of the summed log ratio (k1). Unbiased; can be negative on a small sample.
        `kl_per_token_k3`: mean over tokens of exp(-r) - 1 + r with r the log ratio (k3). Never negative, less noisy.

    Args:
        log_probs, reference_log_probs: (sequences, tokens): log-probabilities of tokens that the *policy* sampled.
        mask: (sequences, tokens), True where a token counts. Other values, NaN included, change nothing.

    Raises:
        UserError: no token counts.
    """
    counted = mask.bool()
    if not counted.any():
        raise UserError("KL of no tokens; at least one generated token is needed")
    ratio = torch.where(counted, log_probs.float() - reference_log_probs.float(), 0.0).double()
    k3 = torch.expm1(-ratio) + ratio
    return {"kl": ratio.sum(dim=1).mean().item(), "kl_per_token_k3": (k3.sum() / counted.sum()).item()}
