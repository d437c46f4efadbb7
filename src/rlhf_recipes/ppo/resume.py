"""What a PPO checkpoint holds beyond the policy: the rollout of an unfinished update, and the optimizer of sharded weights.

A run resumes with the same number of processes or, except under DeepSpeed, with another one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from rlhf_recipes.core.files import files_by_rank, write_text
from rlhf_recipes.ppo.rollout.rollout import Rollout, concatenate_rollouts
from rlhf_recipes.system import (
    full_optimizer_state,
    is_sharded,
    load_full_optimizer_state,
    optimizer_state_by_name,
)

NAMED_OPTIMIZER = "optimizer_by_name.pt"  # full tensors by the names of the weights, for any number of processes


def save_rollout(rollout: Rollout, folder: Path, process: int) -> None:
    """Save this process's episodes of an unfinished update into a checkpoint."""
    tensors = {name: tensor.contiguous() for name, tensor in rollout.tensors().items()}
    save_file(tensors, folder / f"rollout_{process}.safetensors")


def load_rollout(
    folder: Path, process: int, world_size: int, same_world_size: bool, device: torch.device
) -> Rollout | None:
    """Return this process's episodes of the unfinished update in a checkpoint, or None.

    same_world_size: the checkpoint was saved by as many processes. Otherwise all episodes are shared out again.
    """
    paths = files_by_rank(folder, "rollout_*.safetensors")
    if not paths:
        return None
    chosen = paths[process : process + 1] if same_world_size else paths
    parts = [Rollout(**{name: tensor.to(device) for name, tensor in load_file(path).items()}) for path in chosen]
    rollout = concatenate_rollouts(parts)
    if same_world_size:
        return rollout
    rows = process_share(range(len(rollout)), process, world_size)
    return Rollout(**rollout.select(torch.tensor(rows)))


def process_share(rows: Sequence[Any], process: int, world_size: int) -> list[Any]:
    """Return one process's share of the rows of all processes, which are in the order of the processes."""
    share = len(rows) // world_size
    return list(rows[process * share : (process + 1) * share])


def save_sharded_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path, writes: bool
) -> None:
    """Save the full optimizer state of sharded weights, by name, and the schedule. All ranks must call it."""
    state = full_optimizer_state(model, optimizer)
    if writes:
        torch.save(state, folder / NAMED_OPTIMIZER)
        torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)


def needs_named_optimizer(model: nn.Module, checkpoint: str) -> bool:
    """Return whether a checkpoint's optimizer goes by names: it was saved so, or it is loaded into sharded weights."""
    return (Path(checkpoint) / NAMED_OPTIMIZER).is_file() or is_sharded(model)


def load_named_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
    """Load optimizer and schedule from a checkpoint of sharded weights, or into sharded weights. All ranks must call it."""
    named = (folder / NAMED_OPTIMIZER).is_file()
    state = torch.load(folder / (NAMED_OPTIMIZER if named else OPTIMIZER_NAME), map_location="cpu", weights_only=True)
    load_full_optimizer_state(model, optimizer, state if named else optimizer_state_by_name(state, model, optimizer))
    scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


def write_short_card(folder: Path, base_model: str | None, dataset_name: str | None) -> None:
    """Write a short model card where the folder has none. Trainer's own needs a `config`, which policy and value lack."""
    card = folder / "README.md"
    if card.is_file():
        return
    lines = ["---", "library_name: transformers", "tags: [rlhf-recipes, ppo]"]
    lines += [f"base_model: {base_model}"] if base_model and not Path(base_model).exists() else []
    lines += [f"datasets: [{dataset_name}]"] if dataset_name and not Path(dataset_name).exists() else []
    write_text(card, "\n".join([*lines, "---", "A language model trained by PPO with rlhf-recipes.", ""]))
