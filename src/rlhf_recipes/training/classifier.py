"""Training a classifier as a reward model: labelled texts to rows, rows to batches, and the loss of a whole step."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rlhf_recipes.core.tensors import pad
from rlhf_recipes.training.trainer import SafeTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_labelled_texts(
    batch: Mapping[str, Sequence[Any]], tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> dict[str, list[Any]]:
    """Tokenize the column `text` and append EOS, truncated to `max_length` tokens; `label` becomes an int.

    A truncated row has no EOS, as an incomplete answer has none.
    """
    rows = tokenizer(list(batch["text"]), add_special_tokens=False, verbose=False)["input_ids"]
    truncated = [[*row, tokenizer.eos_token_id][:max_length] for row in rows]
    return {"input_ids": truncated, "labels": [int(label) for label in batch["label"]]}


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
    """`SafeTrainer` for texts with labels. test_rows: the test split before it is tokenized."""

    def __init__(self, *, processing_class: Any, test_rows: Any = None, **kwargs: Any) -> None:
        super().__init__(
            processing_class=processing_class,
            data_collator=partial(collate_labelled_texts, pad_id=processing_class.pad_token_id),
            compute_loss_func=mean_cross_entropy,
            **kwargs,
        )
        self.test_rows = test_rows

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as `Trainer` does; the loss is the mean over the held-out rows."""
        result = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        logits, labels = torch.from_numpy(result.predictions).float(), torch.from_numpy(result.label_ids)
        result.metrics[f"{metric_key_prefix}_loss"] = torch.nn.functional.cross_entropy(logits, labels).item()
        return result
