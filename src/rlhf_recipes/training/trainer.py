"""What every trainer here has beyond `transformers.Trainer`: nothing that was saved is lost, nothing broken is saved."""

import json
import logging
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.files import write_text
from rlhf_recipes.core.secrets import redact
from rlhf_recipes.folders import (
    STAGING_FOLDER,
    STATE_FILE,
    disk_full_as_user_error,
    find_checkpoint,
    folder_lock,
    last_checkpoint_note,
    publish,
    raise_if_disk_full,
    raise_if_out_of_memory,
)
from rlhf_recipes.hub import Repo, check_repo, push_checkpoint, push_folder
from rlhf_recipes.system import (
    apply_bitsandbytes_workarounds_,
    check_quantized_storage,
    check_sharding,
    require_same_world_size,
    reset_pending_forward_,
    restore_ties_,
    safe_deepspeed_loading,
)
from rlhf_recipes.training.batches import WholeBatchesTrainer
from rlhf_recipes.training.sigterm import StoppedBySignal, on_sigterm

logger = logging.getLogger(__name__)


class SafeTrainer(WholeBatchesTrainer):
    """Put it first among the bases of a trainer.

    - A checkpoint is whole and sealed with checksums, or not there at all (see `checkpoints`); no pickle of arguments.
    - A run that is resumed goes on bit for bit, and logs what the uninterrupted one would have.
    - SIGTERM ends the run after the optimizer step, in all processes after the same one, with a checkpoint.
    - A loss or a weight that is not finite ends the run; nothing of it is saved.
    - No other process trains into the same folder meanwhile.
    """

    stops_at_nan = True  # before the optimizer step; a trainer that leaves such a step out sets it to False
    asked: dict[str, Any] | None = None  # what a stage was asked, remembered in each checkpoint
    _staging = False
    _resuming_from: str | None = None
    _told_to_end = False  # this process
    _agreed_to_end = False  # all processes
    _loss_is_finite = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        apply_bitsandbytes_workarounds_(self.model)
        check_quantized_storage(self.model, self.args)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's. `True` goes on from the last whole checkpoint in the folder; `"auto"` too, if there is one."""
        folder = str(self.args.output_dir)
        self._resuming_from = find_checkpoint(resume_from_checkpoint, folder)
        self._told_to_end = self._agreed_to_end = False
        self._loss_is_finite = True
        check_sharding(self.accelerator)
        if self._resuming_from is not None and self.is_deepspeed_enabled:
            require_same_world_size(Path(self._resuming_from), self.args.world_size)
        self.remove_callback(_Watch)
        self.add_callback(_Watch(self))  # last, so that it sees what the others wish
        unpickles = self.is_deepspeed_enabled and (self._resuming_from is not None or self.args.load_best_model_at_end)
        read = safe_deepspeed_loading() if unpickles else nullcontext()
        held = folder_lock(folder) if self.args.should_save else nullcontext()
        with held, read, disk_full_as_user_error(Path(folder)), on_sigterm(self._hear):
            try:
                return super().train(self._resuming_from, *args, **kwargs)
            except (MemoryError, RuntimeError) as error:
                raise_if_out_of_memory(error, Path(folder), self.state.global_step + 1)
                raise

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, which would take one step too many where a checkpoint of the last step is resumed."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        found = super().evaluation_loop(*args, **kwargs)
        reset_pending_forward_(self.model)
        return found

    def _hear(self) -> None:
        self._told_to_end = True

    # What is saved and restored besides what Trainer does.

    def progress(self) -> dict[str, Any]:
        """What has been summed up towards the next line of the log, in this process, as JSON takes it."""
        return {
            "processes": self.args.world_size,
            "asked": self.asked,
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "metrics": getattr(self, "_metrics", {}).get("train", {}),  # of TRL's trainers
            "tokens": getattr(self, "_total_train_tokens", 0),
            "training": self.model.training,  # after an evaluation it is not, and TRL's log goes by it
        }

    def save_progress(self, folder: Path) -> None:
        """Called by every process, before the weights are saved."""
        write_text(folder / f"progress_{self.args.process_index}.json", redact(json.dumps(self.progress())))

    def load_progress(self, folder: Path) -> None:
        """Called by every process as training begins, with the checkpoint that it goes on from."""
        told = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("progress_*.json"))]
        if not told:
            return
        loss = sum(each["loss"] for each in told) / len(told)  # the log shows the mean over processes
        if len(told) == self.args.world_size:
            loss = told[self.args.process_index]["loss"]
        self._tr_loss += loss
        self._total_loss_scalar = -loss  # `train_loss` is of the steps of this call, as Trainer has it
        self._globalstep_last_logged = told[0]["last_logged"]
        if told[0]["metrics"] and hasattr(self, "_metrics"):
            self._metrics["train"].update(told[0]["metrics"])  # the same in every process
        self.model.train(told[0]["training"])
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = told[0]["tokens"]

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
            self._name_best(run)
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
        """Trainer's, which is given a tied weight twice where weights are cut apart."""
        super()._save(output_dir, state_dict and restore_ties_(self.model, state_dict))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, but not beside a checkpoint, where TRL writes one: in a folder with nothing else of a run in it yet,
        that would be somebody's. A stage writes its own at the end."""
        if not self._staging:
            super().create_model_card(*args, **kwargs)

    def _name_best(self, run: Path) -> None:
        """Of a checkpoint that is being saved, Trainer knows the place where it is for the moment."""
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (run / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(run / f"checkpoint-{best}")

    # The Hub.

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Nothing yet: a stage opens the repo once nothing else can fail, `push_to_hub` as it pushes."""
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
        """Trainer's, as one commit that is read back before this returns its address (see `hub`)."""
        repo = Repo.asked(self.args)
        repo = repo._replace(
            token=token or repo.token,
            revision=revision or repo.revision,
            private=repo.private if private is None else private,
        )
        check_repo(repo)
        self.init_hf_repo()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(str(self.args.output_dir))
        if not (folder / "README.md").is_file():
            self.create_model_card(**kwargs)
        return push_folder(folder, repo, commit_message or "Left by rlhf-recipes")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging and self.is_world_process_zero():
            push_checkpoint(Path(checkpoint_folder), self.state.global_step, self.args)

    def _send_telemetry(self) -> None:
        """TRL's, where somebody has asked for it: its own switch is read when its library is first imported."""
        if os.environ.get("HF_HUB_DISABLE_TELEMETRY", "1").lower() in ("0", "false", "no", "off"):
            super()._send_telemetry()

    # What ends a run.

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.stops_at_nan:
            self._loss_is_finite &= bool(torch.isfinite(loss))
        return loss

    def agree(self) -> None:
        """Before each optimizer step: all processes learn what one of them knows.

        Raises:
            UserError: the loss is not finite, in one of them.
        """
        known = torch.tensor([float(self._told_to_end), float(not self._loss_is_finite)], device=self.args.device)
        told, broken = known.tolist() if self.args.world_size == 1 else self.accelerator.reduce(known, "sum").tolist()
        self._agreed_to_end, self._loss_is_finite = told > 0, True
        if broken > 0:
            self._refuse(self.state.global_step + 1, "the loss is not finite")

    def require_finite_weights(self) -> None:
        """Every process calls it.

        Raises:
            UserError: a weight that is learnt is not finite, in one of them. A gradient can overflow where the loss did not.
        """
        learnt = [
            _held_here(each) for each in self.model.parameters() if each.requires_grad and each.is_floating_point()
        ]
        broken = torch.tensor(float(not all(torch.isfinite(each).all() for each in learnt)), device=self.args.device)
        if (broken if self.args.world_size == 1 else self.accelerator.reduce(broken, "sum")) > 0:
            self._refuse(self.state.global_step, "a weight is not finite")

    def _refuse(self, step: int, what: str) -> None:
        raise UserError(
            f"step {step}: {what}, and nothing of it is saved{last_checkpoint_note(self.args.output_dir)}; lower "
            "learning_rate or max_grad_norm, or look for the rows that it comes from"
        )


def _held_here(parameter: Any) -> Tensor:
    """The part of a weight that this process holds: all of it, or its shard under FSDP2 or ZeRO-3."""
    weight: Any = parameter.detach()
    if hasattr(parameter, "ds_tensor"):
        # As long in every process; past the weight's end there is memory as it was found.
        shard: Any = parameter.ds_tensor.detach().flatten()
        weight = shard[: max(0, parameter.ds_numel - parameter.ds_zero_partition_rank * shard.numel())]
    return weight.to_local() if isinstance(weight, DTensor) else weight


class _Watch(TrainerCallback):
    """Calls the trainer where only a callback is called."""

    def __init__(self, trainer: SafeTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._resuming_from is not None:
            self.trainer.load_progress(Path(self.trainer._resuming_from))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.agree()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self.trainer._agreed_to_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._agreed_to_end:
            raise StoppedBySignal(f"ended by SIGTERM; saved at step {state.global_step}: go on with --resume auto")
