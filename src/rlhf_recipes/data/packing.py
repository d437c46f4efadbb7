"""Documents, end to end, cut into blocks of the context length: no padding, no token left out but the last few."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_BATCH = 512


def pack_documents(dataset: Any, tokenizer: "PreTrainedTokenizerBase", block: int, column: str = "text") -> Any:
    """Tokenize `column`, end each document with EOS, join them and cut into blocks of `block` tokens.

    Works on a map-style dataset and on a stream alike, and returns the same kind: rows of ``input_ids`` (block,),
    whose labels are the ids. Only the last tokens, too few for a block, are dropped. Empty documents are left out.
    """
    from datasets import Dataset, Features, IterableDataset, List, Value
    from tqdm.auto import tqdm

    features = Features({"input_ids": List(Value("int32"))})
    if isinstance(dataset, Dataset):
        rows = list(_blocks(tqdm(dataset[column], "packing", delay=3), tokenizer, block))
        return Dataset.from_dict({"input_ids": rows}, features=features)

    def stream() -> Iterator[dict[str, Any]]:  # begins anew at each epoch, with nothing carried over from the last
        for ids in _blocks((row[column] for row in dataset), tokenizer, block):
            yield {"input_ids": ids}

    return IterableDataset.from_generator(stream, features=features)


def _blocks(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", block: int) -> Iterator[np.ndarray]:
    texts = iter(texts)
    carried: list[int] = []
    while documents := list(islice(texts, DOCUMENTS_PER_BATCH)):
        kept = [text for text in documents if text]
        encoded = tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"] if kept else []
        for ids in encoded:
            carried.extend(ids)
            carried.append(tokenizer.eos_token_id)
        whole = len(carried) // block * block
        for start in range(0, whole, block):
            yield np.asarray(carried[start : start + block], dtype=np.int32)
        del carried[:whole]
