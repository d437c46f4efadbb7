"""How a classifier is taught to reward model: labelled texts to rows, rows to batches, and the loss of a whole step."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlhf_recipes.core.tensors import pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_labelled_texts(
    batch: Mapping[str, Sequence[Any]], tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> dict[str, list[Any]]:
    """Rows of ids, cut to `max_length`; one that was not cut ends with EOS, as an answer that is complete does."""
    rows = tokenizer(list(batch["text"]), add_special_tokens=False, verbose=False)["input_ids"]
    ended = [[*row, tokenizer.eos_token_id][:max_length] for row in rows]
    return {"input_ids": ended, "labels": [int(label) for label in batch["label"]]}


def collate_labelled_texts(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad to the longest row of the batch, on the right, where the model looks for the last token."""
    ids, mask = pad([row["input_ids"] for row in rows], value=pad_id)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor([row["labels"] for row in rows])}


def mean_cross_entropy(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean over the rows of a whole optimizer step, accumulated and over all processes.

    The classifiers of transformers accept `num_items_in_batch` and ignore it, so their own loss would be summed over
    the accumulated batches rather than averaged.
    """
    loss = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
