"""Documents, end to end, cut into blocks of the context length: no padding, no token left out but the last few."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pack_documents(dataset: Any, tokenizer: "PreTrainedTokenizerBase", block: int, column: str = "text") -> Any:
    """Tokenize `column`, end each document with EOS, join them and cut into blocks of `block` tokens.

    Works on a map-style dataset and on a stream alike. Returns rows of ``input_ids`` (block,) ; the labels are the ids.
    A remainder shorter than a block goes on into the next batch of rows, so that only the very last tokens are dropped.
    """
    carried: list[int] = []

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer([text for text in batch[column] if text], add_special_tokens=False)["input_ids"]
        for ids in encoded:
            carried.extend(ids)
            carried.append(tokenizer.eos_token_id)
        whole = len(carried) // block * block
        blocks = [carried[start : start + block] for start in range(0, whole, block)]
        del carried[:whole]
        return {"input_ids": blocks}

    from datasets import Dataset

    if isinstance(dataset, Dataset):
        return Dataset.from_dict(pack({column: list(dataset[column])}))
    return dataset.map(pack, batched=True, remove_columns=list(next(iter(dataset))))


