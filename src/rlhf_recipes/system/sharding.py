"""Sharded weights (FSDP2, Zhao et al. 2023; ZeRO-3): gather them for rollouts, save and load them.

Each forward pass of a sharded module is a collective operation. Answers have unequal lengths, so a process that is
still generating would wait for ever for one that has finished. During generation every process therefore holds the
full weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from rlhf_recipes.system.deepspeed import deepspeed_engine, gather_weights

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `fully_shard` was applied to the model or to one of its modules."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def unsharded_weights(model: nn.Module, accelerator: Any = None) -> Iterator[None]:
    """Within this block, every process holds the full weights and can run forward passes without the others.

    All ranks must enter and leave the block together. A model that is not sharded is not changed.
    accelerator: the one that the model trains with, to find DeepSpeed's engine.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        with gather_weights(deepspeed_engine(accelerator)):
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def reset_pending_forward_(model: nn.Module) -> None:
    """Reset FSDP modules that the last forward pass ran in part, so that the next pass gathers their weights.

    Accelerate shards embedding, last norm and tied head as one group. TRL's losses do not call the head. If no backward
    pass follows, torch before 2.13 waits for the head for ever and reads sharded weights.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            pending: set[nn.Module] = getattr(module._get_fsdp_state(), "_modules_to_run_forward", set())
            if pending:
                pending.clear()
                module.reshard()


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the state dict with full tensors on rank 0, empty on other ranks. All ranks must call it.

    Tied weights share one tensor.
    """
    return restore_ties_(model, get_model_state_dict(model, options=FULL_STATE))


def restore_ties_(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Replace copies of tied weights in a state dict by one tensor, which is then saved once; return the state dict."""
    first_names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if name in state and first in state:
            state[name] = state[first]
    return state


def load_full_state_dict(model: nn.Module, state: dict[str, Any]) -> None:
    """Load rank 0's full state dict into the model, sharded again. All ranks must call it."""
    set_model_state_dict(model, state, options=_from_rank_0())


def full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer state with full tensors, keyed by parameter name, on rank 0. All ranks must call it."""
    return get_optimizer_state_dict(model, optimizer, options=FULL_STATE)


def optimizer_state_by_name(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return an optimizer's state dict keyed by parameter name; torch keys it by parameter index."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [group | {"params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[index]: value for index, value in state["state"].items()}, "param_groups": groups}


def load_full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load rank 0's result of `full_optimizer_state` into the optimizer. All ranks must call it."""
    set_optimizer_state_dict(model, optimizer, state, options=_from_rank_0())


def _from_rank_0() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
