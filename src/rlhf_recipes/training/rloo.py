"""What a trainer that samples its own batches needs besides TRL's: held-out means, and answers kept in checkpoints."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.files import files_by_rank
from rlhf_recipes.data import column_prompt_ids, decode_answers, is_conversation
from rlhf_recipes.training.held_out import GREATEST, LEAST, ROWS, SPREAD, HeldOutMeans, mask_total

COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
UNSUPPORTED_BY_RLOO = {
    "label_smoothing_factor": "has no effect: RLOO has no labels",
    "log_multimodal": "has no effect: prompts are text",
    "train_sampling_strategy": "has no effect: prompts are repeated for each group of answers",
    "dataloader_drop_last": "has no effect: an epoch holds complete batches of answers only",
} | dict.fromkeys(COMPILE, "does not fit answers of changing length; leave it out")

logger = logging.getLogger(__name__)


class SampledBatches(HeldOutMeans):
    """Mixin before a `SafeTrainer` with TRL's `RLOOTrainer`.

    Held-out means are over answers, some over tokens. A checkpoint within a batch of answers (`steps_per_generation`,
    `num_iterations`) holds the answers, and a resumed run draws the prompts of later epochs in the same order.
    """

    kinds = {
        "kl": "tokens",
        "entropy": "tokens",
        "reward_std": f"{SPREAD} reward",
        "completions/min_length": LEAST,
        "completions/max_length": GREATEST,
        "completions/mean_terminated_length": "ended",
        "completions/min_terminated_length": f"{LEAST} ended",
        "completions/max_terminated_length": f"{GREATEST} ended",
        "clip_ratio/low_min": LEAST,
        "clip_ratio/high_max": GREATEST,
    }
    num_generations_eval: int | None
    num_iterations: int
    state: Any
    _metrics: Any
    _step: int  # TRL's number of micro-batches so far
    _buffered_inputs: Any  # TRL's current batch of answers, in parts
    _train_sampler: Any

    def kind_of(self, name: str) -> str:
        reward = name.removesuffix("/std")
        return super().kind_of(name) if reward == name else f"{SPREAD} {reward}/mean"

    @property
    def rows_per_group(self) -> int:
        return int(self.num_generations_eval or 1)

    def count_held_out(self, inputs: Any) -> dict[str, float]:
        answers = float(len(inputs["completion_ids"]))
        ended = round(answers * (1.0 - self._metrics["eval"]["completions/clipped_ratio"][-1]))
        return {ROWS: answers, "tokens": mask_total(inputs["completion_mask"]), "ended": ended}

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        self._train_sampler = trainer._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def progress(self) -> dict[str, Any]:
        trainer: Any = super()
        return trainer.progress() | {"micro_batches": self._step}

    def save_progress(self, folder: Path) -> None:
        trainer: Any = super()
        trainer.save_progress(folder)
        if self._step % (self.args.steps_per_generation * self.num_iterations):  # else the next step samples again
            parts = enumerate(self._buffered_inputs)
            tensors = {f"{number}.{name}": each.contiguous() for number, part in parts for name, each in part.items()}
            save_file(tensors, folder / f"answers_{self.args.process_index}.safetensors")

    def load_progress(self, folder: Path) -> list[dict[str, Any]]:
        trainer: Any = super()
        saved: list[dict[str, Any]] = trainer.load_progress(folder)
        for _ in range(int(self.state.epoch or 0)):
            next(iter(self._train_sampler), None)  # its generator draws an order for each epoch
        if saved and "micro_batches" in saved[0]:
            self._step = saved[0]["micro_batches"]  # the same in every process
        paths = files_by_rank(folder, "answers_*.safetensors")
        if len(paths) == self.args.world_size:
            self._buffered_inputs = load_parts(paths[self.args.process_index], self.args.device)
        elif paths:
            logger.warning(
                "%s was saved by %d processes in the middle of a batch of answers; %d processes sample new ones",
                folder, len(paths), self.args.world_size,
            )  # fmt: skip
        return saved


def load_parts(path: Path, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Return the parts of a batch of answers that `SampledBatches.save_progress` saved."""
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        number, _, name = key.partition(".")
        parts.setdefault(int(number), {})[name] = tensor.to(device)
    return [parts[number] for number in sorted(parts)]


class OwnTokenization:
    """Mixin before TRL's `RLOOTrainer`: prompts are tokenized, and answers decoded, as in every other stage.

    max_prompt_tokens: read this many last tokens of a longer prompt; None: all.
    """

    processing_class: Any

    def __init__(self, *args: Any, max_prompt_tokens: int | None = None, **kwargs: Any) -> None:
        self.max_prompt_tokens = max_prompt_tokens
        self._rows: list[dict[str, Any]] = []  # whose answers TRL generates
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        self._rows = inputs
        trainer: Any = super()
        return trainer._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        columns = {name: [row[name] for row in self._rows] for name in self._rows[0]}
        return column_prompt_ids(prompts, columns, self.processing_class, self.max_prompt_tokens), None, {}

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        trainer: Any = super()
        prompt_ids, completion_ids, _, *others = trainer._generate(prompts)
        texts = decode_answers(prompt_ids, completion_ids, self.processing_class)
        completions = [
            [{"role": "assistant", "content": text}] if is_conversation(prompt) else text
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return prompt_ids, completion_ids, completions, *others


def check_sampling(training: Any) -> None:
    """Check how answers are sampled; transformers and TRL would refuse these values at the first batch.

    Raises:
        UserError: names the option and its range.
    """
    if training.temperature <= 0:
        raise UserError(
            f"temperature is {training.temperature}; it must be above 0, since RLOO learns from what it samples"
        )
    if training.max_completion_length < 1:
        raise UserError(f"max_completion_length is {training.max_completion_length}; it must be at least 1")
    if training.top_k is not None and training.top_k < 0:
        raise UserError(f"top_k is {training.top_k}; give 1 or more, or 0 to draw from all tokens")
    if not 0 < training.top_p <= 1:
        raise UserError(f"top_p is {training.top_p}; give a share above 0, up to 1")
    if training.min_p is not None and not 0 <= training.min_p <= 1:
        raise UserError(f"min_p is {training.min_p}; give a share from 0 to 1")
    if training.repetition_penalty <= 0:
        raise UserError(f"repetition_penalty is {training.repetition_penalty}; it must be above 0, and 1 is none")
    options = training.generation_kwargs
    known = vars(GenerationConfig())
    if isinstance(options, dict) and (unknown := sorted(set(options) - set(known))):
        raise UserError(
            f"generation_kwargs has the unknown key {unknown[0]}; give fields of transformers' GenerationConfig"
        )
