"""A run that is killed goes on as if it had not been.

Trainer's checkpoints hold weights, optimizer, schedule and log. One in the middle of an update needs the rollout that
the remaining steps learn from as well, and every checkpoint what has been summed up towards the next line of the log.
Trainer writes trainer_state.json last, so a checkpoint without a readable one was cut off, and is passed over.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from rlhf_recipes.arguments import UserError
from rlhf_recipes.artifacts import resume_point, write_text
from rlhf_recipes.ppo.callbacks import Answers
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.experience import Experience
from rlhf_recipes.ppo.guard import StepGuard
from rlhf_recipes.ppo.rollout import Rollout
from rlhf_recipes.ppo.tally import UpdateLog
from rlhf_recipes.ppo.value_head import base_model

STATE = "trainer_state.json"


class ResumableTrainer(Trainer):
    """Saves and restores PPO: the policy's folder is an ordinary model folder, the value lies beside it."""

    args: PPOConfig
    experience: Experience
    guard: StepGuard
    updates: UpdateLog
    underway: Rollout | None
    answers: Answers | None
    last_samples: list[dict[str, Any]]
    _resuming_from: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; `True` goes on from the last complete checkpoint, bit for bit as if the run had never stopped."""
        self._resuming_from = resume_point(resume_from_checkpoint, str(self.args.output_dir))
        return super().train(self._resuming_from, *args, **kwargs)

    def restore_progress(self) -> None:
        """Put back, as training begins, what Trainer does not keep."""
        told: dict[str, Any] = {}
        self.underway = None
        if self._resuming_from is not None:
            _check_processes(self._resuming_from, self.args.world_size)
            self.underway, told = load_progress(self._resuming_from, self.args.process_index, self.args.device)
        if told:
            self.updates.restore(told["updates"], self.args.device)
            self.experience.restore(told["experience"])
            self.guard.restore(told["guard"])
            self.last_samples = told["samples"]
            self._tr_loss += told["loss"]
            self._total_loss_scalar = -told["loss"]  # `train_loss` is of the steps of this call, as Trainer has it
            self._globalstep_last_logged = told["last_logged"]
        if self.answers is not None and self.args.should_save:
            self.answers.begin(math.ceil(self.state.global_step / self.args.steps_per_update))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # one that is written over is incomplete until its state is there again
            (folder / STATE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        told = {
            "processes": self.args.world_size,
            "updates": self.updates.state(),
            "experience": self.experience.state(),
            "guard": self.guard.state(),
            "samples": self.last_samples,
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
        }
        if not self.args.save_only_model:
            save_progress(folder, self.args.process_index, self.underway, told)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:  # Trainer asks every process
            return
        folder = Path(output_dir or str(self.args.output_dir))
        in_checkpoint = folder.name.startswith("checkpoint-")
        self.model.save_pretrained(folder, state_dict, value=self.args.save_value_model or in_checkpoint)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_pretrained(resume_from_checkpoint)

    def create_model_card(self, *args: Any, dataset_name: str | None = None, **kwargs: Any) -> None:
        """A short card, where the folder has none yet. Trainer's own reads a `config` that policy and value have not."""
        card = Path(str(self.args.output_dir)) / "README.md"
        if self.args.should_save and not card.is_file():
            lines = ["---", "library_name: transformers", "tags: [rlhf-recipes, ppo]"]
            base = base_model(self.model.policy).name_or_path
            lines += [f"base_model: {base}"] if base and not Path(base).exists() else []
            lines += [f"datasets: [{dataset_name}]"] if dataset_name and not Path(dataset_name).exists() else []
            write_text(card, "\n".join([*lines, "---", "A language model trained by PPO with rlhf-recipes.", ""]))

    def _load_best_model(self) -> None:
        self.model.load_pretrained(self.state.best_model_checkpoint)


def _check_processes(folder: str | Path, processes: int) -> None:
    """Refuse to go on with another number of processes: half a rollout has no other half then."""
    _, told = load_progress(folder, 0)
    if told and told["processes"] != processes:
        raise UserError(
            f"{folder} was saved by {told['processes']} processes and this run has {processes}; launch as many, or start "
            "a new run from the weights in it"
        )


def save_progress(folder: str | Path, process: int, rollout: Rollout | None, told: dict[str, Any]) -> None:
    """rollout: this process's, or None between two updates. told: what JSON takes; floats come back bit for bit."""
    path = Path(folder) / f"ppo_{process}.json"
    if rollout is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in rollout.tensors().items()}
        save_file(tensors, path.with_suffix(".safetensors"))
    else:
        path.with_suffix(".safetensors").unlink(missing_ok=True)
    write_text(path, json.dumps(told))


def load_progress(
    folder: str | Path, process: int, device: torch.device | str = "cpu"
) -> tuple[Rollout | None, dict[str, Any]]:
    """What `save_progress` left for this process; nothing, where a checkpoint holds nothing for it."""
    path = Path(folder) / f"ppo_{process}.json"
    if not path.is_file():
        return None, {}
    told = json.loads(path.read_text(encoding="utf-8"))
    kept = path.with_suffix(".safetensors")
    return (Rollout(**load_file(kept, device=str(device))) if kept.is_file() else None), told
