"""Packing for pretraining: documents joined and split into blocks of the context length, without padding."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_recipes.data.special_tokens import begin_with, bos_prefix, end_with_eos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_BATCH = 512


def pack_documents(dataset: Any, tokenizer: "PreTrainedTokenizerBase", block: int, column: str = "text") -> Any:
    """Tokenize `column`, join the documents, and split the result into blocks of `block` tokens.

    A document begins with the tokenizer's prefix (BOS for Llama, nothing for GPT-2) and ends with EOS. A map-style dataset
    gives a map-style one, a stream a stream. Rows hold ``input_ids`` (block,), int32; the labels are the ids. Empty
    documents are skipped. The last tokens, too few for a block, are dropped.
    """
    from datasets import Dataset, Features, IterableDataset, List, Value
    from tqdm.auto import tqdm

    features = Features({"input_ids": List(Value("int32"))})
    if isinstance(dataset, Dataset):
        rows = list(_blocks(tqdm(dataset[column], "packing", delay=3), tokenizer, block))
        return Dataset.from_dict({"input_ids": rows}, features=features)

    def stream() -> Iterator[dict[str, Any]]:  # starts over at each epoch; no tokens carry over
        for ids in _blocks((row[column] for row in dataset), tokenizer, block):
            yield {"input_ids": ids}

    return IterableDataset.from_generator(stream, features=features)


def _blocks(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", block: int) -> Iterator[np.ndarray]:
    """Yield blocks of ids, each (block,)."""
    texts, prefix = iter(texts), bos_prefix(tokenizer)
    pending: list[int] = []
    while documents := list(islice(texts, DOCUMENTS_PER_BATCH)):
        nonempty = [text for text in documents if text]
        encoded = tokenizer(nonempty, add_special_tokens=False, verbose=False)["input_ids"] if nonempty else []
        for ids in encoded:
            pending.extend(end_with_eos(begin_with(prefix, ids), tokenizer))
        end = len(pending) // block * block
        for start in range(0, end, block):
            yield np.asarray(pending[start : start + block], dtype=np.int32)
        del pending[:end]
