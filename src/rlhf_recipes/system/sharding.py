"""Weights that are cut apart over the processes (FSDP2, Zhao et al. 2023; ZeRO-3), where rollouts want them whole.

Each forward pass of a sharded module is a meeting of all processes. Answers are of unequal length, so one process would
wait for ever for another that has finished: while it answers, each holds the weights whole.
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

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the model or to a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def unsharded_weights(model: nn.Module, accelerator: Any = None) -> Iterator[None]:
    """For the time, every process holds all weights, and may run the model as often as it likes without the others.

    All processes enter and leave together. A model that is not sharded is left as it is. accelerator: what the model trains
    under.
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
    """Let the next forward pass gather its weights anew, whatever the last one left out.

    Accelerate puts embedding, last norm and a tied head into one group, which TRL's losses leave with the head uncalled;
    torch before 2.13 waits for it for ever where no backward pass follows, and reads weights that are cut apart.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            waiting: set[nn.Module] = getattr(module._get_fsdp_state(), "_modules_to_run_forward", set())
            if waiting:
                waiting.clear()
                module.reshard()


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict with whole tensors, on the first process; empty on the others. All of them call it.

    What is one weight under two names, such as a tied head, is one tensor here too.
    """
    return restore_ties_(model, get_model_state_dict(model, options=WHOLE))


def restore_ties_(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose tensors were gathered one by one, with one tensor for what is one weight under two names: so
    that it is saved once."""
    firsts: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = firsts.setdefault(id(parameter), name)
        if name in state and first in state:
            state[name] = state[first]
    return state


def load_full_state_dict(model: nn.Module, state: dict[str, Any]) -> None:
    """Cut a whole state dict apart again. All processes call it; the first one's counts."""
    set_model_state_dict(model, state, options=_from_first())


def full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state with whole tensors by the names of the weights, on the first process."""
    return get_optimizer_state_dict(model, optimizer, options=WHOLE)


def optimizer_state_by_name(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """An optimizer's ordinary state dict, whose weights are numbered, by the names of the weights."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [group | {"params": [order[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {order[number]: value for number, value in state["state"].items()}, "param_groups": groups}


def load_full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """What `full_optimizer_state` gave, of the first process; all of them call it, or one that is alone."""
    set_optimizer_state_dict(model, optimizer, state, options=_from_first())


def _from_first() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
