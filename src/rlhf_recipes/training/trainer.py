"""`transformers.Trainer` whose runs lose nothing that was saved and save nothing that is broken."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from rlhf_recipes.core.files import files_by_rank, write_text
from rlhf_recipes.core.secrets import redact
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.data import RowCounts
from rlhf_recipes.folders import (
    STAGING_FOLDER,
    STATE_FILE,
    disk_full_as_user_error,
    find_checkpoint,
    folder_lock,
    publish,
    raise_if_disk_full,
    raise_if_out_of_memory,
)
from rlhf_recipes.hub import Repo, check_repo, push_checkpoint, push_folder
from rlhf_recipes.models import is_quantized, trainable_to_float32_
from rlhf_recipes.system import (
    apply_bitsandbytes_workarounds_,
    check_quantized_storage,
    check_sharding,
    require_same_world_size,
    reset_pending_forward_,
    restore_ties_,
    safe_deepspeed_loading,
)
from rlhf_recipes.training.batches import complete_batch_size, complete_batches_sampler, drop_last, keep_last
from rlhf_recipes.training.disk import warn_of_lost_state
from rlhf_recipes.training.finite import all_finite, nonfinite_error
from rlhf_recipes.training.hooks import StepHooks
from rlhf_recipes.training.sigterm import on_sigterm

logger = logging.getLogger(__name__)


class SafeTrainer(Trainer):
    """`Trainer` with guarantees about what it leaves on the disk. Put it first among the bases of a trainer.

    - A checkpoint is complete and has checksums, or it does not exist (see `folders`); it holds no pickled arguments.
    - A resumed run continues bit for bit, and logs what the uninterrupted run would have logged.
    - SIGTERM ends the run after the current optimizer step, the same one in all processes, with a checkpoint.
    - A loss or a weight that is not finite ends the run, and nothing of it is saved.
    - No other process can train into the same folder at the same time.
    - With `global_batch_size` an epoch drops its last incomplete batch, so that a run is the same on any number of processes.
    """

    stop_at_nonfinite_loss = True  # False in a trainer that skips such an optimizer step itself
    requested: dict[str, Any] | None = None  # the options a stage was run with; each checkpoint holds them
    row_counts: dict[str, RowCounts] | None = None  # by split: what happened to its rows
    measure_before: Callable[[Any], dict[str, Any]] | None = (
        None  # (trainer) -> held-out numbers before the first step
    )
    measured_before: dict[str, float] = {}
    _staging = False
    _resuming_from: str | None = None
    _stop_requested = False  # in this process
    _stopping = False  # in all processes
    _loss_is_finite = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        apply_bitsandbytes_workarounds_(self.model)
        if is_quantized(base_model(self.model)):
            trainable_to_float32_(self.model)  # TRL rounds adapters to bfloat16, where small steps of Adam are lost
        check_quantized_storage(self.model, self.args)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does. `True` resumes from the last complete checkpoint in the folder, `"auto"` if there is one."""
        folder = str(self.args.output_dir)
        self._resuming_from = find_checkpoint(resume_from_checkpoint, folder)
        self._stop_requested = self._stopping = False
        self._loss_is_finite = True
        check_sharding(self.accelerator)
        if self._resuming_from is not None and self.is_deepspeed_enabled:
            require_same_world_size(Path(self._resuming_from), self.args.world_size)
        warn_of_lost_state(self._resuming_from)
        self.remove_callback(StepHooks)
        self.add_callback(StepHooks(self))  # last, so that it sees the decisions of the others
        unpickles = self.is_deepspeed_enabled and (self._resuming_from is not None or self.args.load_best_model_at_end)
        loading = safe_deepspeed_loading() if unpickles else nullcontext()
        lock = folder_lock(folder) if self.args.should_save else nullcontext()
        with lock, loading, disk_full_as_user_error(Path(folder)), on_sigterm(self._request_stop):
            try:
                return super().train(self._resuming_from, *args, **kwargs)
            except (MemoryError, RuntimeError) as error:
                raise_if_out_of_memory(error, Path(folder), self.state.global_step + 1)
                raise

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch. Without this, `Trainer` takes one step too many when it resumes from the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        result = super().evaluation_loop(*args, **kwargs)
        reset_pending_forward_(self.model)
        return result

    def _request_stop(self) -> None:
        self._stop_requested = True

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        batch_size = complete_batch_size(self.args, self.train_dataset)
        return sampler if batch_size is None else complete_batches_sampler(sampler, batch_size)

    def get_train_dataloader(self) -> DataLoader:
        with drop_last(self.args, complete_batch_size(self.args, self.train_dataset) is not None):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with keep_last(self.args):
            return super().get_eval_dataloader(*args, **kwargs)

    # What is saved and restored besides what Trainer does.

    def progress(self) -> dict[str, Any]:
        """Return what this process has summed up towards the next line of the log, as JSON accepts it."""
        return {
            "world_size": self.args.world_size,
            "requested": self.requested,
            "measured_before": self.measured_before,
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "metrics": getattr(self, "_metrics", {}).get("train", {}),  # of TRL's trainers
            "tokens": getattr(self, "_total_train_tokens", 0),
            "training": self.model.training,  # False after an evaluation, and TRL's log depends on it
        }

    def save_progress(self, folder: Path) -> None:
        """Write `progress` into a checkpoint. All ranks must call it, before the weights are saved."""
        write_text(folder / f"progress_{self.args.process_index}.json", redact(json.dumps(self.progress())))

    def load_progress(self, folder: Path) -> list[dict[str, Any]]:
        """Restore `progress` from a checkpoint as training begins; returns that of each process. All ranks must call it."""
        paths = files_by_rank(folder, "progress_*.json")
        saved = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        if not saved:
            return saved
        loss = sum(each["loss"] for each in saved) / len(saved)  # the log shows the mean over processes
        if len(saved) == self.args.world_size:
            loss = saved[self.args.process_index]["loss"]
        self._tr_loss += loss
        self._total_loss_scalar = -loss  # `train_loss` covers the steps of this call only, as in Trainer
        self._globalstep_last_logged = saved[0]["last_logged"]
        if saved[0]["metrics"] and hasattr(self, "_metrics"):
            self._metrics["train"].update(saved[0]["metrics"])  # the same in every process
        self.model.train(saved[0]["training"])
        self.measured_before = saved[0].get("measured_before", {})
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = saved[0]["tokens"]
        return saved

    # Checkpoints.

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / STAGING_FOLDER) if self._staging else str(run)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, run = self.state.global_step, Path(self._get_output_dir(trial))
        staged, place = run / STAGING_FOLDER / f"checkpoint-{step}", run / f"checkpoint-{step}"
        self.require_finite_weights()
        if self.args.should_save:
            shutil.rmtree(run / STAGING_FOLDER, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            self.save_progress(staged)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._correct_best_checkpoint(run)
            if self.args.should_save:
                self.state.save_to_json(str(staged / STATE_FILE))
                (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml says the same
                publish(staged, place)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise_if_disk_full(error, run, step)
            raise
        finally:
            self._staging = False
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save as `Trainer` does; it receives a tied weight twice where weights are sharded."""
        super()._save(output_dir, state_dict and restore_ties_(self.model, state_dict))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write a card, but never into a checkpoint, as TRL does; a stage writes its own at the end of the run."""
        if not self._staging:
            super().create_model_card(*args, **kwargs)

    def _correct_best_checkpoint(self, run: Path) -> None:
        """Name the final place of the best checkpoint; `Trainer` knows only the folder it is saved in first."""
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (run / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(run / f"checkpoint-{best}")

    # The Hub.

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Set the repo's name only. A stage creates the repo once nothing else can fail, `push_to_hub` when it pushes."""
        self.hub_model_id = self.args.hub_model_id

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save and push the model as one commit, read it back, and return its address (see `hub`)."""
        repo = Repo.from_arguments(self.args)
        private = repo.private if private is None else private
        repo = repo._replace(token=token or repo.token, revision=revision or repo.revision, private=private)
        check_repo(repo)
        self.init_hf_repo()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(str(self.args.output_dir))
        if not (folder / "README.md").is_file():
            self.create_model_card(**kwargs)
        return push_folder(folder, repo, commit_message or "Pushed by rlhf-recipes")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging and self.is_world_process_zero():
            push_checkpoint(Path(checkpoint_folder), self.state.global_step, self.args)

    def _send_telemetry(self) -> None:
        """Send TRL's telemetry only where somebody has turned it on; TRL reads its own switch at import."""
        if os.environ.get("HF_HUB_DISABLE_TELEMETRY", "1").lower() in ("0", "false", "no", "off"):
            super()._send_telemetry()

    # What ends a run.

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.stop_at_nonfinite_loss:
            self._loss_is_finite &= bool(torch.isfinite(loss))
        return loss

    def synchronize_stop(self) -> None:
        """Let all processes know what one of them knows. All ranks must call it, before each optimizer step.

        Raises:
            UserError: the loss is not finite in one of them.
        """
        flags = torch.tensor([float(self._stop_requested), float(not self._loss_is_finite)], device=self.args.device)
        stop, broken = self.reduce(flags).tolist()
        self._stopping, self._loss_is_finite = stop > 0, True
        if broken > 0:
            raise nonfinite_error(self.state.global_step + 1, "the loss", self.args.output_dir)

    def require_finite_weights(self) -> None:
        """Refuse to continue with broken weights: a gradient can overflow where the loss did not. All ranks must call it.

        Raises:
            UserError: a trained weight is not finite in one of the processes.
        """
        broken = torch.tensor(float(not all_finite(self.model.parameters())), device=self.args.device)
        if self.reduce(broken) > 0:
            raise nonfinite_error(self.state.global_step, "a weight", self.args.output_dir)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes. All ranks must call it."""
        return tensor if self.args.world_size == 1 else self.accelerator.reduce(tensor, reduction="sum")
