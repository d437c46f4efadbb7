"""Whether weights are finite, sharded ones included, and the error if they are not."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.folders import last_checkpoint_note


def all_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether every trained weight that this process holds is finite."""
    trained = [local_shard(each) for each in parameters if each.requires_grad and each.is_floating_point()]
    return all(bool(torch.isfinite(each).all()) for each in trained)


def local_shard(parameter: Any) -> Tensor:
    """Return the part of a weight that this process holds: all of it, or its shard under FSDP2 or ZeRO-3."""
    weight: Any = parameter.detach()
    if hasattr(parameter, "ds_tensor"):
        # Shards have one length in all processes; beyond the end of the weight the memory is uninitialised.
        shard: Any = parameter.ds_tensor.detach().flatten()
        weight = shard[: max(0, parameter.ds_numel - parameter.ds_zero_partition_rank * shard.numel())]
    return weight.to_local() if isinstance(weight, DTensor) else weight


def nonfinite_error(step: int, what: str, output_dir: Any) -> UserError:
    """Return the error that ends a run at a step whose loss or weight (`what`) is not finite."""
    return UserError(
        f"step {step}: {what} is not finite, and nothing of it is saved{last_checkpoint_note(output_dir)}; lower "
        "learning_rate or max_grad_norm, or look for the rows that cause it"
    )
