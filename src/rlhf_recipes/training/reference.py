"""A reference model that follows the policy (`sync_ref_model`): each checkpoint holds it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.system import full_state_dict, is_sharded, load_full_state_dict, zero_stage

REFERENCE_FILE = "reference.safetensors"


def save_reference(model: nn.Module, path: Path, writes: bool) -> None:
    """Save the weights of a reference model; a tied weight is saved once. All ranks must call it, one of them writes."""
    state: Mapping[str, Tensor] = full_state_dict(model) if is_sharded(model) else model.state_dict()
    if writes:
        names = [name for name, _ in model.named_parameters()]
        save_file({name: state[name].detach().cpu().contiguous() for name in names}, path)


def load_reference_(model: nn.Module, path: Path) -> None:
    """Load the weights of a reference model from a checkpoint, in place. All ranks must call it."""
    saved = load_file(path)
    if not is_sharded(model):
        model.load_state_dict(saved, strict=False)
        return
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {name: first[id(each)] for name, each in model.named_parameters(remove_duplicate=False)}
    load_full_state_dict(model, {name: saved[source] for name, source in tied.items()})


def check_synced_reference(training: Any, uses_adapter: bool) -> None:
    """Check that a reference that follows the policy exists and can be kept in checkpoints.

    Raises:
        UserError: `sync_ref_model` with an adapter, with precomputed log-probabilities, without a KL penalty, or under ZeRO-3.
    """
    if not training.sync_ref_model:
        return
    if uses_adapter:
        raise UserError(
            "sync_ref_model needs a separate reference model, and an adapter has none; leave one of them out"
        )
    if getattr(training, "precompute_ref_log_probs", False):
        raise UserError("precompute_ref_log_probs needs a fixed reference; leave it or sync_ref_model out")
    if training.beta == 0.0:
        raise UserError(
            "sync_ref_model has no effect with beta 0, which uses no reference; leave it out or raise --beta"
        )
    if zero_stage(training) == 3:
        raise UserError("sync_ref_model cannot be kept in checkpoints under ZeRO-3; use ZeRO-2, FSDP or DDP")


class SyncedReference:
    """Mixin before a `SafeTrainer` of TRL's: with `sync_ref_model` checkpoints hold the reference model too."""

    args: Any
    accelerator: Any
    ref_model: Any

    def save_progress(self, folder: Path) -> None:
        trainer: Any = super()
        trainer.save_progress(folder)
        if self.args.sync_ref_model:
            save_reference(self._reference(), folder / REFERENCE_FILE, self.args.should_save)

    def load_progress(self, folder: Path) -> list[dict[str, Any]]:
        trainer: Any = super()
        saved: list[dict[str, Any]] = trainer.load_progress(folder)
        if self.args.sync_ref_model:
            path = folder / REFERENCE_FILE
            if not path.is_file():
                raise UserError(
                    f"{folder} holds no reference model, because its run had no sync_ref_model; leave --sync_ref_model out"
                )
            load_reference_(self._reference(), path)
        return saved

    def _reference(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.ref_model)
        return model
