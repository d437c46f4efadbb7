"""Defaults of every training stage, in place of transformers'."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.processes import world_size
from rlhf_recipes.core.unsupported import requested_unsupported
from rlhf_recipes.training.best_model import choose_metric_, point_plateau_

LORA_FACTOR = 10.0  # the best learning rate of LoRA over that of full training (Schulman et al. 2025)
NO_TEMPLATE_PATH = {
    "chat_template_path": "would change the tokenizer after the rows are checked; put the template into the model's folder "
    "as chat_template.jinja"
}


def learning_rate_field(usual: float) -> Any:
    """Return a dataclass field for the peak learning rate of a stage whose usual one is given."""
    text = f"Peak learning rate. Unset: {usual:g}; for an adapter (--use_peft) {LORA_FACTOR * usual:g}."
    return field(default=None, metadata={"help": text})


@dataclass
class TrainingDefaults:
    """Our defaults over a `TrainingArguments` child; put it first among the bases.

    Without an accelerator `use_cpu` is set, so that several launched CPU processes are ranks of one run, too. bf16 is
    on if the GPU supports it. Gradient checkpointing is off.

    Raises:
        UserError: an unknown `resume`, or a `global_batch_size` that the number of processes does not divide.
    """

    best_metric: ClassVar[str] = "eval_loss"
    usual_learning_rate: ClassVar[float] = 5e-5
    unsupported: ClassVar[Mapping[str, str]] = {
        "do_train": "has no effect: a stage trains",
        "do_eval": "has no effect: a stage measures held-out rows at its end, and with eval_strategy also in between",
        "do_predict": "has no effect: a stage measures held-out rows at its end",
        "local_rank": "has no effect: launch several processes with torchrun or accelerate",
        "label_names": "has no effect: a stage knows the columns that it learns from",
        "prediction_loss_only": "would leave out metrics that the stage reports; leave it out",
        "batch_eval_metrics": "does not fit the metrics of a stage; lower --per_device_eval_batch_size instead",
        "include_for_metrics": "has no effect: no metric of a stage reads it",
        "eval_do_concat_batches": "must stay on: metrics are over all rows",
        "eval_use_gather_object": "must stay off: held-out rows are tensors",
        "auto_find_batch_size": "would change the run; set --global_batch_size and lower --per_device_train_batch_size",
        "enable_jit_checkpoint": "has no effect: a run that gets SIGTERM saves a checkpoint",
        "hub_always_push": "has no effect: a push waits for the one before",
        "liger_kernel_config": "cannot be given here; leave it out, and Liger's own defaults apply",
        "parallelism_config": "cannot be given here; set it in the configuration of accelerate launch",
    }

    learning_rate: float | None = learning_rate_field(5e-5)
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 autocast. Unset: on if it is faster for the model's size on this hardware."},
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps from one log entry to the next."})
    logging_first_step: bool = field(
        default=True, metadata={"help": "Log the first step, so that every run has a curve."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Data parallelism: look for parameters without a gradient in each step."}
    )
    save_total_limit: int | None = field(
        default=2,
        metadata={"help": "Checkpoints to keep beside the final model: the last one, and an older one as a backup."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows in one optimizer step (ppo: episodes in one update), in all processes together. With it a run "
            "is the same for any number of processes: gradient_accumulation_steps follows from it, and an epoch drops "
            "the last incomplete batch (ppo fills the last update with prompts from the start of the epoch)."
        },
    )
    per_device_train_batch_size: int = field(
        default=None,  # type: ignore[assignment]  # `split_global_batch_` sets it
        metadata={
            "help": "Rows of one micro-batch in each process. Unset: 8, or with global_batch_size its whole share."
        },
    )
    hub_private_repo: bool | None = field(
        default=True,
        metadata={"help": "Push to a private repo and refuse an existing public one; false: a new repo is public."},
    )
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "When push_to_hub pushes: end, or also at each checkpoint: every_save (the model), checkpoint (and "
            "the checkpoint, to last-checkpoint/) or all_checkpoints (each one to its own folder)."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the Python code in the model's folder or repo. Read it first."},
    )
    eval_before_training: bool = field(
        default=True,
        metadata={
            "help": "Measure held-out rows before the first step too; metrics.json has <name>_before beside <name>."
        },
    )
    resume: str | None = field(
        default=None,
        metadata={"help": "auto: continue from the last complete checkpoint in output_dir; without one, start."},
    )

    def __post_init__(self) -> None:
        import torch

        if self.resume not in (None, "auto"):
            raise UserError(f"resume is {self.resume!r}; give auto, or a checkpoint as resume_from_checkpoint")
        requested = requested_unsupported(self)  # before transformers changes values
        if self.eval_strategy != "no":  # type: ignore[attr-defined]
            requested = [name for name in requested if name != "do_eval"]  # transformers sets it, and recipes hold it
        self.__dict__["_unsupported_requested"] = requested
        self.split_global_batch_(world_size())
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = (
                torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not getattr(self, "fp16", False)
            )
            self.__dict__["_bf16_by_hardware"] = True
        if getattr(self, "activation_checkpointing", None) is None:
            self.activation_checkpointing = self.gradient_checkpointing  # the name since transformers 5.23
        if not hasattr(self, "activation_checkpointing_kwargs"):
            self.activation_checkpointing_kwargs = getattr(self, "gradient_checkpointing_kwargs", None)
        if self.learning_rate is None:
            self.learning_rate = self.usual_learning_rate
            self.__dict__["_learning_rate_by_default"] = True
        choose_metric_(self, self.best_metric)
        pad_token = self.__dict__.pop("pad_token", None)  # TRL warns about its field of this name
        super().__post_init__()  # type: ignore[misc]
        if pad_token is not None:
            self.pad_token = pad_token
        point_plateau_(self)

    def split_global_batch_(self, processes: int) -> None:
        """Set the batch size and accumulation steps of a process so that all `processes` make up `global_batch_size`.

        Raises:
            UserError: `processes` does not divide it.
        """
        rows = self.global_batch_size
        if rows is None:
            self.per_device_train_batch_size = self.per_device_train_batch_size or 8
            return
        share = rows // processes
        if share < 1 or rows % processes:
            raise UserError(
                f"global_batch_size {rows} does not divide among {processes} processes; launch a number of processes "
                "that divides it, or set another global_batch_size"
            )
        largest = min(self.per_device_train_batch_size or share, share)
        self.per_device_train_batch_size = next(size for size in range(largest, 0, -1) if share % size == 0)
        self.gradient_accumulation_steps = share // self.per_device_train_batch_size


@dataclass
class FineTuningDefaults(TrainingDefaults):
    """`TrainingDefaults` for stages that start from a model and its tokenizer."""

    unsupported = {"model_init_kwargs": "has no effect: use --dtype, --attn_implementation and --trust_remote_code"}

    pad_token: str | None = field(
        default=None,
        metadata={"help": "Padding token, for a tokenizer without one (the released GPT-2: <|endoftext|>)."},
    )
