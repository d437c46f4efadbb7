"""PPO goes on where it was killed as if it had not been, by as many processes or by others.

A checkpoint in the middle of an update needs the rollout that the remaining steps learn from, and every checkpoint what
has been summed up towards the next line of the log.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from rlhf_recipes.core.files import write_text
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.models import has_adapter
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.logging.callbacks import Answers
from rlhf_recipes.ppo.logging.metrics import UpdateMetrics
from rlhf_recipes.ppo.rollout.collect import RolloutCollector
from rlhf_recipes.ppo.rollout.rollout import Rollout, joined
from rlhf_recipes.ppo.update.guard import StepGuard
from rlhf_recipes.system import (
    deepspeed_engine,
    exclude_frozen_weights_,
    full_optimizer_state,
    full_state_dict,
    is_sharded,
    load_full_optimizer_state,
    optimizer_state_by_name,
    restore_ties_,
)
from rlhf_recipes.training import SafeTrainer

BY_NAME = (
    "optimizer_by_name.pt"  # of sharded weights: whole tensors, which any number of processes can take apart again
)


class ResumableTrainer(SafeTrainer):
    """Saves and restores PPO: the policy's folder is an ordinary model folder, the value lies beside it."""

    args: PPOConfig
    experience: RolloutCollector
    guard: StepGuard
    updates: UpdateMetrics
    underway: Rollout | None
    answers: Answers | None
    last_samples: list[dict[str, Any]]
    stops_at_nan = False  # `StepGuard` leaves such a step out

    def begin(self) -> None:
        """As training begins: nothing is under way, and of the answers those are kept that the run already gave."""
        self.underway = None
        if self.answers is not None and self.args.should_save:
            self.answers.begin(math.ceil(self.state.global_step / self.args.steps_per_update))

    def progress(self) -> dict[str, Any]:
        return super().progress() | {
            "updates": self.updates.state(),
            "experience": self.experience.state(),
            "guard": self.guard.state(),
            "samples": self.last_samples,
        }

    def save_progress(self, folder: Path) -> None:
        super().save_progress(folder)
        if self.underway is not None:
            tensors = {name: tensor.contiguous() for name, tensor in self.underway.tensors().items()}
            save_file(tensors, folder / f"rollout_{self.args.process_index}.safetensors")

    def load_progress(self, folder: Path) -> None:
        super().load_progress(folder)
        paths = sorted(folder.glob("progress_*.json"), key=_process_of)
        told = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        if not told or "updates" not in told[0]:
            return  # a checkpoint of weights alone
        alike, here = len(told) == self.args.world_size, self.args.process_index
        mine = [told[here]["updates"]] if alike else [each["updates"] for each in told]
        self.updates.restore(mine, self.args.device, counts=alike or here == 0)
        self.experience.restore(told[0]["experience"])  # the same in every process
        self.guard.restore(told[0]["guard"])
        self.last_samples = self._mine([row for each in told for row in each["samples"]])
        kept = sorted(folder.glob("rollout_*.safetensors"), key=_process_of)
        if kept:
            parts = [_rollout_in(path, self.args.device) for path in (kept[here : here + 1] if alike else kept)]
            whole = joined(parts)
            self.underway = whole if alike else Rollout(**whole.select(torch.tensor(self._mine(range(len(whole))))))

    def _mine(self, rows: Sequence[Any]) -> list[Any]:
        """This process's share of what all processes have, in the order of the processes."""
        share = len(rows) // self.args.world_size
        return list(rows[self.args.process_index * share : (self.args.process_index + 1) * share])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None:
            state_dict = restore_ties_(self.model, state_dict)
        elif is_sharded(self.model):
            state_dict = full_state_dict(self.model)
        if not self.args.should_save:  # Trainer asks every process
            return
        folder = Path(output_dir or str(self.args.output_dir))
        in_checkpoint = folder.name.startswith("checkpoint-")
        self.model.save_pretrained(folder, state_dict, value=self.args.save_value_model or in_checkpoint)
        self.processing_class.save_pretrained(folder)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, called when everything else is as it trains, and no checkpoint has been read yet."""
        engine = deepspeed_engine(self.accelerator)
        if engine is not None and has_adapter(self.model.policy):
            exclude_frozen_weights_(engine)
        return super().create_scheduler(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_pretrained(resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's; of sharded weights the optimizer's whole state, so that any number of processes goes on from it."""
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = full_optimizer_state(self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / BY_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        named = checkpoint is not None and (Path(checkpoint) / BY_NAME).is_file()
        if checkpoint is None or not (named or is_sharded(self.model)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = self.optimizer.optimizer
        kept = Path(checkpoint) / (BY_NAME if named else OPTIMIZER_NAME)
        state = torch.load(kept, map_location="cpu", weights_only=True)
        load_full_optimizer_state(
            self.model, optimizer, state if named else optimizer_state_by_name(state, self.model, optimizer)
        )
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

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
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        self.model.load_pretrained(self.state.best_model_checkpoint)


def _rollout_in(path: Path, device: torch.device) -> Rollout:
    return Rollout(**{name: tensor.to(device) for name, tensor in load_file(path).items()})


def _process_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])
