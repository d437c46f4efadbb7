"""What pretraining adds to `Trainer`: an L1 penalty, a collator for packed blocks, continuations while it trains."""

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
from rlhf_recipes.generation import Sampling, row_seed, sample, stop_ids
from rlhf_recipes.optimizations import fuse_kernels_
from rlhf_recipes.training.trainer import SafeTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = "samples.md"


def collate_blocks(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Blocks of equal length -> ids and labels, both (batch, block). The labels are the ids; the model shifts them."""
    ids = torch.tensor([list(row["input_ids"]) for row in rows], dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


class PretrainTrainer(SafeTrainer):
    """`Trainer` with `l1_penalty` times the sum of |w| over the weights that weight decay also shrinks.

    The penalty is part of the training loss and of its gradient once per optimizer step, however many micro-batches or
    processes the step is made of; the evaluation loss is the language model's alone.

    `held_out_texts` are whole documents to measure at the end; `eval_dataset` holds the same ones, packed.
    """

    def __init__(self, *args: Any, l1_penalty: float = 0.0, held_out_texts: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fuse_kernels_(self.model, self.args.device)
        self.l1_penalty, self.held_out_texts = l1_penalty, list(held_out_texts)
        decayed = set(self.get_decay_parameter_names(self.model))
        self._penalised = [weight for name, weight in self.model.named_parameters() if name in decayed]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.l1_penalty and model.training:
            # With a count of items the loss is a share of the whole step's, and the shares are summed: so is this one.
            # Without it Trainer divides by the number of micro-batches itself.
            shares = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.l1_penalty / shares * self.absolute_weights()
        return (loss, outputs) if return_outputs else loss

    def absolute_weights(self) -> Tensor:
        """Sum of |w| over the decayed weights, biases and layer norms left out. A tied weight counts once."""
        return torch.stack([weight.abs().sum(dtype=torch.float32) for weight in self._penalised]).sum()


class SampleContinuations(TrainerCallback):
    """Continues the same prompts at every evaluation and at the end, and keeps the texts in samples.md.

    The random numbers are the same each time, so that what changes between two samples is the model. Like a document
    of the training stream, every prompt follows an EOS; an empty prompt starts a document.
    """

    def __init__(
        self, prompts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", tokens: int, context: int, seed: int = 0
    ) -> None:
        self.prompts, self.tokenizer, self.tokens, self.seed = list(prompts), tokenizer, tokens, seed
        self.sections: list[str] = []
        self.last_step = -1
        start = [tokenizer.eos_token_id]
        self.rows = [start + tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        for prompt, row in zip(prompts, self.rows, strict=True):
            if len(row) + tokens > context:
                raise UserError(
                    f"sample prompt {prompt[:40]!r} has {len(row) - 1} tokens, and with {tokens} sampled ones it does "
                    f"not fit the context of {context}; shorten it or lower --sample_tokens"
                )

    def continuations(self, model: "PreTrainedModel") -> list[str]:
        """One continuation a prompt."""
        sampling = Sampling(self.tokens, stop_ids=stop_ids(model, self.tokenizer))
        seeds = [row_seed(self.seed, index) for index in range(len(self.rows))]
        return sample(model, self.rows, sampling, seeds).texts(self.tokenizer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = Path(args.output_dir) / SAMPLES
        if state.global_step and kept.is_file():  # a resumed run goes on in the same file
            self.sections = [kept.read_text(encoding="utf-8").split("\n\n", 1)[-1].rstrip()]

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(Path(args.output_dir), state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(Path(args.output_dir), state, kwargs["model"])

    def _write(self, folder: Path, state: Any, model: "PreTrainedModel") -> None:
        if not self.rows or state.global_step == self.last_step:
            return
        self.last_step = state.global_step
        # By every process, in step: each pass over weights that are cut apart is a meeting of all.
        pairs = list(zip(self.prompts, self.continuations(model), strict=True))
        if not state.is_world_process_zero:
            return
        lines = [f"- {_continued(prompt, text)}" for prompt, text in pairs]
        self.sections.append("\n".join([f"## Step {state.global_step}", "", *lines]))
        write_text(folder / SAMPLES, "\n\n".join(["# Continuations", *self.sections]) + "\n")
        print(f"\nstep {state.global_step}: " + " | ".join(prompt + text for prompt, text in pairs[:2]), flush=True)


def _continued(prompt: str, text: str) -> str:
    """Markdown of one line; nothing in the texts is read as marks."""
    start, rest = (escape_markdown(each).replace("_", "\\_") for each in (prompt, text))
    if start:
        gap = " " if prompt[-1:].isspace() or text[:1].isspace() else ""
        return f"**{start}**{gap}{rest}"
    return re.sub(r"^(\d*)([#+=.)-])", r"\1\\\2", rest)  # what makes a heading or a list at the start of a line
