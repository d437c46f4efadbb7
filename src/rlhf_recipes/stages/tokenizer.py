"""Train a byte-level BPE tokenizer (Radford et al. 2019) with a chat template, for GPT-2-style models."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.processes import is_main_process
from rlhf_recipes.data import (
    ROLE_TOKENS,
    chat_template,
    load_texts,
)
from rlhf_recipes.folders import check_output_folder, clear_output_folder, complete_output_folder
from rlhf_recipes.hub import HubArguments, check_push, open_requested_repo, push_if_requested

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"  # ends every document and assistant turn: EOS, and BOS too
PAD = "<|pad|>"  # not EOS, so that masking the padding never masks an EOS
BYTES = 256


@dataclass
class TokenizerArguments(HubArguments, DatasetArguments):
    """The text to train on, and the size of the vocabulary."""

    output_dir: str = field(default="runs/tokenizer", metadata={"help": "Output folder for the tokenizer."})
    vocab_size: int = field(
        default=8192, metadata={"help": "Number of tokens: 256 bytes, the special tokens, and merges."}
    )
    min_frequency: int = field(default=2, metadata={"help": "Merge only pairs that occur at least this often."})
    special_tokens: list[str] | None = field(
        default=None, metadata={"help": "Further special tokens, beside end of text, padding and the three roles."}
    )
    text_column: str = field(
        default="text",
        metadata={
            "help": "Column with text. A dataset without it is read by its messages, or prompts and completions."
        },
    )
    model_max_length: int = field(
        default=1024, metadata={"help": "Longest input in tokens, saved with the tokenizer."}
    )
    dataset_streaming: bool = field(default=False, metadata={"help": "Stream the rows instead of loading them all."})

    def __post_init__(self) -> None:
        least = BYTES + len(self.all_special_tokens())
        if self.vocab_size < least:
            raise UserError(
                f"vocab_size {self.vocab_size} is too small for the 256 bytes and {least - BYTES} special tokens; "
                f"give at least {least}"
            )
        if self.min_frequency < 1 or self.model_max_length < 1:
            raise UserError("min_frequency and model_max_length must be at least 1")
        if any(not token.strip() for token in self.special_tokens or []):
            raise UserError("special_tokens holds an empty token; leave it out")

    def all_special_tokens(self) -> list[str]:
        """Return the special tokens in the order of their ids, without duplicates."""
        return list(dict.fromkeys([END_OF_TEXT, PAD, *ROLE_TOKENS.values(), *(self.special_tokens or [])]))


def train_tokenizer(texts: Iterable[str], arguments: TokenizerArguments) -> "PreTrainedTokenizerBase":
    """Train the merges on `texts`. Every byte has a token, so any text round-trips and no token is unknown."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    special = arguments.all_special_tokens()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        min_frequency=arguments.min_frequency,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    return GPT2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        pad_token=PAD,
        extra_special_tokens=special[2:],
        chat_template=chat_template(),
        model_max_length=arguments.model_max_length,
        clean_up_tokenization_spaces=False,
    )


def run_tokenizer(arguments: TokenizerArguments) -> Path:
    """Train a tokenizer and leave a folder that `AutoTokenizer` loads. With several processes, rank 0 does the work."""
    check_push(arguments)
    sources = [arguments.dataset_name, *(arguments.extra_dataset_names or [])]
    folder = check_output_folder(arguments.output_dir, arguments.overwrite, sources)
    train, held_out = load_texts(arguments, arguments.text_column, streaming=arguments.dataset_streaming)
    if not is_main_process():
        return folder
    tokenizer = train_tokenizer(train, arguments)
    measured = measure_tokenizer(tokenizer, train if held_out is None else held_out)
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
        notes=f"`bytes_per_token` is measured on {'held-out text' if held_out else 'the training text'}.",
    )
    push_if_requested(folder, arguments)
    return folder


def measure_tokenizer(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str]) -> dict[str, float]:
    """Return `bytes_per_token` (UTF-8 bytes of text per token), `bytes` and `tokens`."""
    size, count = 0, 0
    for text in texts:
        size += len(text.encode("utf-8"))
        count += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return {"bytes_per_token": size / count if count else 0.0, "bytes": size, "tokens": count}
