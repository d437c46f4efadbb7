"""Training a classifier as a reward model: labelled texts to rows, rows to batches, and the loss of a whole step."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rlhf_recipes.core.tensors import pad
from rlhf_recipes.data import encode_completion, template_options
from rlhf_recipes.training.trainer import SafeTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABELLED_COLUMNS = ("completion", "messages", "text")


def encode_labelled(row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Tokenize a labelled row to `input_ids`, which begin and end as the rows that a reward model scores; `labels` is an int.

    row: label, and text, messages, or prompt and completion; optionally tools and chat_template_kwargs.
    """
    prompt, whole = row.get("prompt"), next(row[name] for name in LABELLED_COLUMNS if row.get(name) is not None)
    before, after = encode_completion(prompt, whole, tokenizer, **template_options(row))
    return {"input_ids": [*before, *after], "labels": int(row["label"])}


def collate_labelled_texts(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest: ids and mask (batch, width), labels (batch,).

    On the right, because the model looks for the last token before the padding.
    """
    ids, mask = pad([row["input_ids"] for row in rows], value=pad_id)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor([row["labels"] for row in rows])}


def mean_cross_entropy(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Compute this batch's part of the mean loss over an optimizer step, with all its micro-batches and processes.

    transformers' classifiers accept `num_items_in_batch` and ignore it: Trainer would add up the means of the
    micro-batches instead of averaging them.
    """
    loss = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class ClassifierTrainer(SafeTrainer):
    """`SafeTrainer` for texts with labels."""

    def __init__(self, *, processing_class: Any, **kwargs: Any) -> None:
        super().__init__(
            processing_class=processing_class,
            data_collator=partial(collate_labelled_texts, pad_id=processing_class.pad_token_id),
            compute_loss_func=mean_cross_entropy,
            **kwargs,
        )

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as `Trainer` does; the loss is the mean over the held-out rows."""
        result = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        logits, labels = torch.from_numpy(result.predictions).float(), torch.from_numpy(result.label_ids)
        result.metrics[f"{metric_key_prefix}_loss"] = torch.nn.functional.cross_entropy(logits, labels).item()
        return result
