"""Pretraining with `Trainer`: an L1 penalty, a collator for packed blocks, and sample continuations."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.files import write_text
from rlhf_recipes.core.markdown import escape_markdown
from rlhf_recipes.data import document_start, plain_ids
from rlhf_recipes.generation import Sampling, row_seed, sample, stop_ids
from rlhf_recipes.optimizations import fuse_kernels_
from rlhf_recipes.training.held_out import HeldOutMeans
from rlhf_recipes.training.trainer import SafeTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES_FILE = "samples.md"


def collate_blocks(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Stack blocks of equal length to ids and labels, both (batch, block). Labels equal ids; the model shifts them."""
    ids = torch.tensor([list(row["input_ids"]) for row in rows], dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


class PretrainTrainer(HeldOutMeans, SafeTrainer):
    """A `Trainer` that adds `l1_penalty` times the sum of |w| over the weights with weight decay to the loss.

    The penalty is in the training loss and its gradient once per optimizer step, for any number of micro-batches and
    processes. The evaluation loss has no penalty.

    Args:
        l1_penalty: its coefficient; 0: none.
        held_out_texts: documents for the perplexity at the end; `eval_dataset` holds the same ones, packed.
    """

    def __init__(self, *args: Any, l1_penalty: float = 0.0, held_out_texts: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fuse_kernels_(self.model, self.args.device)
        self.l1_penalty, self.held_out_texts = l1_penalty, list(held_out_texts)
        decayed = set(self.get_decay_parameter_names(self.model))
        self._penalized = [weight for name, weight in self.model.named_parameters() if name in decayed]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the language model's loss and, in training, this micro-batch's part of the penalty."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.l1_penalty and model.training:
            # With `num_items_in_batch` Trainer adds up the micro-batches' losses, each a part of the
            # step's; without it Trainer divides by their number itself.
            parts = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.l1_penalty / parts * self.absolute_weights()
        return (loss, outputs) if return_outputs else loss

    def absolute_weights(self) -> Tensor:
        """Sum |w| over the weights with weight decay, so without biases and layer norms. A tied weight counts once."""
        return torch.stack([weight.abs().sum(dtype=torch.float32) for weight in self._penalized]).sum()


class SampleContinuations(TrainerCallback):
    """Continues the same prompts at every evaluation and at the end, and writes the texts to samples.md.

    The random numbers are the same each time, so two samples differ by the model alone. Every prompt begins as a document of
    the training data does: with the tokenizer's prefix, or else after an EOS. An empty prompt starts a document.

    Args:
        tokens: length of a continuation.
        context: the model's context in tokens.

    Raises:
        UserError: a prompt and its continuation exceed the context.
    """

    def __init__(
        self, prompts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", tokens: int, context: int, seed: int = 0
    ) -> None:
        self.prompts, self.tokenizer, self.tokens, self.seed = list(prompts), tokenizer, tokens, seed
        self.sections: list[str] = []
        self.last_step = -1
        start = document_start(tokenizer)
        self.rows = [start + plain_ids(prompt, tokenizer) for prompt in prompts]
        for prompt, row in zip(prompts, self.rows, strict=True):
            if len(row) + tokens > context:
                raise UserError(
                    f"sample prompt {prompt[:40]!r} has {len(row) - len(start)} tokens, and with {tokens} sampled ones it does "
                    f"not fit the context of {context}; shorten it or lower --sample_tokens"
                )

    def continuations(self, model: "PreTrainedModel") -> list[str]:
        """Sample one continuation of each prompt."""
        sampling = Sampling(self.tokens, stop_ids=stop_ids(model, self.tokenizer))
        seeds = [row_seed(self.seed, index) for index in range(len(self.rows))]
        return sample(model, self.rows, sampling, seeds).texts(self.tokenizer, self.rows)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file = Path(args.output_dir) / SAMPLES_FILE
        if state.global_step and file.is_file():  # a resumed run appends to the file
            self.sections = [file.read_text(encoding="utf-8").split("\n\n", 1)[-1].rstrip()]

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(Path(args.output_dir), state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(Path(args.output_dir), state, kwargs["model"])

    def _write(self, folder: Path, state: Any, model: "PreTrainedModel") -> None:
        if not self.rows or state.global_step == self.last_step:
            return
        self.last_step = state.global_step
        # All processes must sample: a forward pass over sharded weights is a collective.
        pairs = list(zip(self.prompts, self.continuations(model), strict=True))
        if not state.is_world_process_zero:
            return
        lines = [f"- {_continued(prompt, text)}" for prompt, text in pairs]
        self.sections.append("\n".join([f"## Step {state.global_step}", "", *lines]))
        write_text(folder / SAMPLES_FILE, "\n\n".join(["# Continuations", *self.sections]) + "\n")
        print(f"\nstep {state.global_step}: " + " | ".join(prompt + text for prompt, text in pairs[:2]), flush=True)


def _continued(prompt: str, text: str) -> str:
    """Format a prompt (bold) and its continuation as one line of Markdown, with all markup in the texts escaped."""
    # The two are joined, so every underscore may become markup, also one inside a word.
    start, rest = (re.sub(r"(?<!\\)_", r"\\_", escape_markdown(part)) for part in (prompt, text))
    if start:
        gap = " " if prompt[-1:].isspace() or text[:1].isspace() else ""
        return f"**{start}**{gap}{rest}"
    return re.sub(r"^(\d*)([#+=.)-])", r"\1\\\2", rest)  # would make a heading or a list at the start of a line
