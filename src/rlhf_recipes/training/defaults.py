"""What every training stage means unless it is told otherwise, over transformers' own defaults."""

from dataclasses import dataclass, field

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.processes import world_size


@dataclass
class TrainingDefaults:
    """House defaults over a `TrainingArguments` child; put it first among the bases.

    A machine without an accelerator is used as such (`use_cpu`), which also makes two launched CPU processes two ranks
    of one run; bf16 is on where the GPU has it; gradient checkpointing is off until asked for.
    """

    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 autocast. Unset: on where the hardware gains by it, for the model's size."},
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    logging_first_step: bool = field(
        default=True, metadata={"help": "Log the first step, so that every run has a curve."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Data parallelism: look for parameters without a gradient in each step."}
    )
    save_total_limit: int | None = field(
        default=2,
        metadata={"help": "Checkpoints kept beside the final model: the last, and one should that be damaged."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows in one optimizer step (ppo: episodes in one update), of all processes together. With it a run is "
            "the same on any number of them: gradient_accumulation_steps follows from it, and an epoch is whole batches."
        },
    )
    per_device_train_batch_size: int = field(
        default=None,  # type: ignore[assignment]  # until `split_global_batch_`
        metadata={
            "help": "Rows at once in each process. Unset: 8; with global_batch_size, as many as it leaves to a process."
        },
    )
    hub_private_repo: bool | None = field(
        default=True,
        metadata={"help": "A new repo on the Hub is private, and a public one is refused; false: a public one."},
    )
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "When push_to_hub sends: end, or at each checkpoint too: every_save (the model), checkpoint (and the "
            "checkpoint, to last-checkpoint/) or all_checkpoints (to a folder each)."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the Python code that the model's folder or repo brings along. Read it first."},
    )
    resume: str | None = field(
        default=None,
        metadata={"help": "auto: go on from the last whole checkpoint in output_dir; begin where there is none."},
    )

    def __post_init__(self) -> None:
        import torch

        if self.resume not in (None, "auto"):
            raise UserError(f"resume is {self.resume!r}; give auto, or name a checkpoint in resume_from_checkpoint")
        self.split_global_batch_(world_size())
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = (
                torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not getattr(self, "fp16", False)
            )
            self.__dict__["_bf16_by_hardware"] = True
        if getattr(self, "activation_checkpointing", None) is None:
            self.activation_checkpointing = self.gradient_checkpointing  # transformers' newer name of the same
        pad_token = self.__dict__.pop("pad_token", None)  # ours names the tokenizer's; TRL warns of its own
        super().__post_init__()  # type: ignore[misc]
        if pad_token is not None:
            self.pad_token = pad_token

    def split_global_batch_(self, processes: int) -> None:
        """Rows at once, and how often, so that all processes together come to `global_batch_size` an optimizer step."""
        rows = self.global_batch_size
        if rows is None:
            self.per_device_train_batch_size = self.per_device_train_batch_size or 8
            return
        share = rows // processes
        if share < 1 or rows % processes:
            raise UserError(
                f"global_batch_size {rows} does not divide among {processes} processes; launch a number of them that "
                "divides it, or set another global_batch_size"
            )
        most = min(self.per_device_train_batch_size or share, share)
        self.per_device_train_batch_size = next(size for size in range(most, 0, -1) if share % size == 0)
        self.gradient_accumulation_steps = share // self.per_device_train_batch_size


@dataclass
class FineTuningDefaults(TrainingDefaults):
    """`TrainingDefaults` for stages that start from a model and its tokenizer."""

    pad_token: str | None = field(
        default=None,
        metadata={"help": "Padding token, for a tokenizer without one (the released GPT-2: <|endoftext|>)."},
    )
