"""Text -> a byte-level BPE tokenizer (Radford et al. 2019) with a chat template, for GPT-2-style models."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.processes import is_main_process
from rlhf_recipes.data import (
    ROLE_TOKENS,
    chat_template,
    is_conversation,
    load_test_split,
    load_training_sources,
    require_columns,
    require_text,
)
from rlhf_recipes.folders import check_output_folder, clear_output_folder, complete_output_folder
from rlhf_recipes.hub import HubArguments, check_push, open_requested_repo, push_if_requested

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"  # ends every document and every assistant turn, so it is EOS, and BOS too
PAD = "<|pad|>"  # of its own, so that masking the padding never masks an EOS
BYTES = 256


@dataclass
class TokenizerArguments(HubArguments, DatasetArguments):
    """What text to learn from, and how large the vocabulary becomes."""

    output_dir: str = field(default="runs/tokenizer", metadata={"help": "Folder to leave the tokenizer in."})
    vocab_size: int = field(
        default=8192, metadata={"help": "Tokens in all: 256 bytes, the special tokens, and merges for the rest."}
    )
    min_frequency: int = field(default=2, metadata={"help": "A pair seen fewer times is not merged."})
    special_tokens: list[str] | None = field(
        default=None, metadata={"help": "Special tokens beside end of text, padding and the three roles."}
    )
    text_column: str = field(
        default="text",
        metadata={"help": "Column of text. Without it, messages or prompts with their completions are read."},
    )
    model_max_length: int = field(default=1024, metadata={"help": "Longest input in tokens, as the folder says it."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read rows as they come, not all at once."})

    def __post_init__(self) -> None:
        least = BYTES + len(self.all_special_tokens())
        if self.vocab_size < least:
            raise UserError(
                f"vocab_size {self.vocab_size} has no room for the 256 bytes and {least - BYTES} special tokens; "
                f"give at least {least}"
            )
        if self.min_frequency < 1 or self.model_max_length < 1:
            raise UserError("min_frequency and model_max_length must be at least 1")
        if any(not token.strip() for token in self.special_tokens or []):
            raise UserError("special_tokens holds an empty token; leave it out")

    def all_special_tokens(self) -> list[str]:
        """The special tokens in the order of their ids, each once."""
        return list(dict.fromkeys([END_OF_TEXT, PAD, *ROLE_TOKENS.values(), *(self.special_tokens or [])]))


def train_tokenizer(texts: Iterable[str], arguments: TokenizerArguments) -> "PreTrainedTokenizerBase":
    """Learn the merges from `texts`. Every byte has a token, so any text round-trips and nothing is unknown."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    special = arguments.all_special_tokens()
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        min_frequency=arguments.min_frequency,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    return GPT2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        pad_token=PAD,
        extra_special_tokens=special[2:],
        chat_template=chat_template(),
        model_max_length=arguments.model_max_length,
        clean_up_tokenization_spaces=False,
    )


def run_tokenizer(arguments: TokenizerArguments) -> Path:
    """Train a tokenizer and leave a folder that `AutoTokenizer` loads. Of several processes, the first one works."""
    check_push(arguments)
    sources = [arguments.dataset_name, *(arguments.extra_dataset_names or [])]
    folder = check_output_folder(arguments.output_dir, arguments.overwrite, sources)
    learnt_from, held_out = _load_texts(arguments)
    if not is_main_process():
        return folder
    limit = arguments.max_train_samples
    tokenizer = train_tokenizer(_texts(learnt_from, arguments, limit), arguments)
    measured = measure_tokenizer(
        tokenizer, _texts(held_out, arguments) if held_out else _texts(learnt_from, arguments, limit)
    )
    open_requested_repo(arguments)
    clear_output_folder(folder)
    tokenizer.save_pretrained(folder)
    complete_output_folder(
        folder,
        stage="tokenizer",
        title="Byte-level BPE tokenizer",
        parents={"text": ", ".join(filter(None, sources))},
        metrics={"vocab_size": len(tokenizer), **measured},
        arguments=[arguments],
        notes=f"`bytes_per_token` is measured on {'held-out text' if held_out else 'the text it was learnt from'}.",
    )
    push_if_requested(folder, arguments)
    return folder


def _load_texts(arguments: TokenizerArguments) -> tuple[list[Any], list[Any]]:
    """The training splits, and the held-out split if there is one; each is checked to hold text."""
    parts = load_training_sources(arguments, streaming=arguments.dataset_streaming)
    test = load_test_split(arguments, streaming=arguments.dataset_streaming)
    datasets = [*parts, *([] if test is None else [test])]
    for dataset in datasets:
        columns = require_columns(dataset, *_columns(arguments), role="the text to learn from")
        if columns == (arguments.text_column,):
            require_text(dataset, arguments.text_column, "the text to learn from")
    return parts, datasets[len(parts) :]


def _columns(arguments: TokenizerArguments) -> list[tuple[str, ...]]:
    pairs = [("prompt", "chosen", "rejected"), ("prompt", "completion"), ("chosen", "rejected")]
    return [(arguments.text_column,), ("messages",), *pairs, ("prompt",)]


def _texts(datasets: Iterable[Any], arguments: TokenizerArguments, limit: int | None = None) -> Iterator[str]:
    """Every text in the first `limit` rows: the text column, or the words of the messages, prompts and answers."""
    rows = ((row, require_columns(dataset, *_columns(arguments))) for dataset in datasets for row in dataset)
    for row, columns in islice(rows, limit):
        for column in columns:
            value = row[column]
            if value is not None:
                yield from (message["content"] for message in value) if is_conversation(value) else [str(value)]


def measure_tokenizer(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> dict[str, float]:
    """`bytes_per_token` (UTF-8 bytes of text that one token stands for), `bytes` and `tokens`."""
    size, count = 0, 0
    for text in texts:
        size += len(text.encode("utf-8"))
        count += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return {"bytes_per_token": size / count if count else 0.0, "bytes": size, "tokens": count}
