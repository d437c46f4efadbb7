"""The rows of a stage as its model would read them: what ``rlhf-recipes show <stage>`` prints. Nothing is trained."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import (
    NO_LOSS,
    PREFERENCE,
    PROMPT,
    TEXT,
    FormOptions,
    LoadedRows,
    Prompts,
    ShownRow,
    load_rows,
    load_split_rows,
    pack_documents,
    row_length,
    show_rows,
    text_ids,
    text_options,
)
from rlhf_recipes.models import check_policy, check_starting_model, context_length, load_config, load_tokenizer
from rlhf_recipes.training.demonstrations import encode_demonstrations, load_demonstrations
from rlhf_recipes.training.preferences import (
    encode_dpo_pairs,
    encode_labels,
    encode_pairs,
    load_pairs,
    load_reward_rows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CONTEXT = 128  # of a new model whose context is not given


@dataclass
class ShowArguments:
    """What is shown."""

    shown_rows: int = field(default=2, metadata={"help": "Number of rows of each split to show."})

    def __post_init__(self) -> None:
        if self.shown_rows < 1:
            raise UserError(f"shown_rows is {self.shown_rows}; give at least 1")


@dataclass(frozen=True)
class Shown:
    """What a stage shows: encoded rows of each split, and how one of them is printed."""

    tokenizer: "PreTrainedTokenizerBase"
    splits: dict[str, Any]
    row: Callable[[int, Any], Iterator[ShownRow]]
    limit: int | None


def show_stage(stage: str, shown: ShowArguments, arguments: Sequence[Any]) -> None:
    """Print the first rows of a stage's splits as its model reads them, and the lengths of all rows.

    Args:
        stage: its word, such as ``sft``.
        arguments: the dataclasses of the stage, as its ``run_<stage>`` takes them.

    Raises:
        UserError: a stage without rows to show; all that the stage itself refuses about models and data.
    """
    if stage not in SHOWN:
        raise UserError(f"show knows the stages {', '.join(SHOWN)}, not {stage!r}")
    found = SHOWN[stage](*arguments)
    for split, rows in found.splits.items():
        lengths = sorted(row_length(row) for row in rows)
        limit = "" if found.limit is None else f"; the model reads {found.limit}"
        print(
            f"\n== {split}: {len(rows)} rows of {lengths[0]} to {lengths[-1]} tokens (median {median(lengths):g}){limit}"
        )
        first = [
            line for index, row in zip(range(shown.shown_rows), rows, strict=False) for line in found.row(index, row)
        ]
        show_rows(first, found.tokenizer)


def _splits(rows: LoadedRows) -> dict[str, Any]:
    return {"train": rows.train} | ({} if rows.test is None else {"test": rows.test})


def _sft(arguments: Any, model_config: Any, training: Any) -> Shown:
    tokens = {"eos_token": training.eos_token, "pad_token": training.pad_token}
    start = check_policy(model_config, training.max_length, **tokens, trust_remote_code=training.trust_remote_code)
    rows = load_demonstrations(arguments, start, training.dataset_text_field)
    too_long = arguments.too_long or "drop"
    rows = rows.each_split(lambda split, counts: encode_demonstrations(split, counts, start, too_long, training))

    def row(index: int, encoded: Any) -> Iterator[ShownRow]:
        yield ShownRow(f"row {index}", encoded["input_ids"], [label != NO_LOSS for label in encoded["labels"]])

    return Shown(start.tokenizer, _splits(rows), row, start.max_length)


def _reward(arguments: Any, model_config: Any, training: Any) -> Shown:
    tokens = {"eos_token": training.eos_token, "pad_token": training.pad_token}
    code = training.trust_remote_code
    start = check_starting_model(model_config, training.max_length, **tokens, trust_remote_code=code)
    rows = load_reward_rows(arguments, start)
    encode = encode_pairs if rows.form == PREFERENCE else encode_labels
    rows = rows.each_split(lambda split, counts: encode(split, counts, start, arguments.too_long, training))

    def pair(index: int, encoded: Any) -> Iterator[ShownRow]:
        margin = f"margin {encoded['margin']:g}, " if "margin" in encoded else ""
        for side in ("chosen", "rejected"):
            yield _scored(f"row {index}, {side}", encoded[f"{side}_ids"], f"{margin}scored at the marked token")

    def labelled(index: int, encoded: Any) -> Iterator[ShownRow]:
        label = "good" if encoded["labels"] else "bad"
        yield _scored(f"row {index}", encoded["input_ids"], f"label {label}, read at the marked token")

    return Shown(start.tokenizer, _splits(rows), pair if rows.form == PREFERENCE else labelled, start.max_length)


def _scored(title: str, ids: Sequence[int], note: str) -> ShownRow:
    return ShownRow(title, ids, [index == len(ids) - 1 for index in range(len(ids))], note, counts_loss=False)


def _dpo(arguments: Any, model_config: Any, training: Any) -> Shown:
    code = training.trust_remote_code
    start = check_policy(model_config, training.max_length, pad_token=training.pad_token, trust_remote_code=code)
    too_long = arguments.too_long or "drop"
    rows = load_pairs(arguments, start)
    rows = rows.each_split(lambda split, counts: encode_dpo_pairs(split, counts, start, too_long, training))

    def row(index: int, encoded: Any) -> Iterator[ShownRow]:
        prompt = encoded["prompt_ids"]
        for side in ("chosen", "rejected"):
            answer = encoded[f"{side}_ids"]
            loss = [False] * len(prompt) + [True] * len(answer)
            yield ShownRow(f"row {index}, {side}", [*prompt, *answer], loss)

    return Shown(start.tokenizer, _splits(rows), row, start.max_length)


def _ppo(arguments: Any, model_config: Any, training: Any) -> Shown:
    pad = getattr(arguments, "pad_token", None) or getattr(training, "pad_token", None)
    code = training.trust_remote_code
    start = check_policy(model_config, None, pad_token=pad, trust_remote_code=code)
    tokens = getattr(arguments, "prompt_tokens", None)
    form = PROMPT if tokens is None else TEXT
    rows = load_rows(arguments, FormOptions((form,), keep_columns=True, tokenizer=start.tokenizer))
    answer = getattr(training, "response_length", None) or training.max_completion_length
    encoded = {name: _prompts(split, start.tokenizer, tokens) for name, split in _splits(rows).items()}
    context = context_length(start.config)
    return Shown(start.tokenizer, encoded, _prompt_row, None if context is None else context - answer)


def _eval(arguments: Any) -> Shown:
    if not arguments.models or not arguments.dataset_name:
        raise UserError("nothing to show; pass --models and --dataset_name")
    code = {"trust_remote_code": arguments.trust_remote_code}
    tokenizer = load_tokenizer(arguments.models[0], "model", **code)
    named = {} if arguments.prompt_column is None else {"prompt": arguments.prompt_column}
    texts = arguments.prompt_tokens is not None
    options = FormOptions((PROMPT,), columns=named, tokenizer=tokenizer, text_prompts=texts)
    name, split, config = arguments.dataset_name, arguments.dataset_split, arguments.dataset_config
    rows = load_split_rows(name, split, arguments, options, config=config)
    context = context_length(load_config(arguments.models[0], **code))
    limit = None if context is None else context - arguments.max_new_tokens
    return Shown(tokenizer, {split: _prompts(rows.train, tokenizer, arguments.prompt_tokens)}, _prompt_row, limit)


def _prompts(rows: Any, tokenizer: "PreTrainedTokenizerBase", tokens: int | None) -> list[dict[str, Any]]:
    """Return rows of `input_ids` with the other columns beside them in `columns`."""
    if tokens is not None:
        column = "text" if "text" in rows.column_names else "prompt"
        return [{"input_ids": text_ids(text, tokenizer)[:tokens], "columns": {}} for text in rows[column]]
    prompts = Prompts(rows, tokenizer, None, 0)
    columns = [{name: row[name] for name in prompts.columns} for row in rows]
    return [{"input_ids": ids, "columns": others} for ids, others in zip(prompts.ids, columns, strict=True)]


def _prompt_row(index: int, encoded: Any) -> Iterator[ShownRow]:
    others = ", ".join(f"{name}={value!r:.60}" for name, value in encoded["columns"].items())
    yield ShownRow(f"row {index}", encoded["input_ids"], None, others and f"for the rewards: {others}")


def _pretrain(arguments: Any, model_config: Any, training: Any) -> Shown:
    name = arguments.tokenizer_name or model_config.model_name_or_path
    if not name:
        raise UserError("no tokenizer; pass --tokenizer_name or --model_name_or_path")
    code = {"trust_remote_code": training.trust_remote_code}
    tokenizer, context = load_tokenizer(name, **code), arguments.max_length
    if context is None and model_config.model_name_or_path:
        context = context_length(load_config(model_config.model_name_or_path, **code))
    context = context or DEFAULT_CONTEXT
    rows = load_rows(arguments, text_options(FormOptions((TEXT,)), arguments.text_column))
    blocks = {split: pack_documents(each, tokenizer, context) for split, each in _splits(rows).items()}
    if not len(blocks["train"]):
        raise UserError(
            f"the text is shorter than one block of {context} tokens; give more text or a lower --max_length"
        )
    kept = {split: each for split, each in blocks.items() if len(each)}

    def row(index: int, block: Any) -> Iterator[ShownRow]:
        yield ShownRow(f"block {index}", block["input_ids"], [True] * len(block["input_ids"]))

    return Shown(tokenizer, kept, row, context)


SHOWN: dict[str, Callable[..., Shown]] = {
    "pretrain": _pretrain,
    "sft": _sft,
    "reward": _reward,
    "ppo": _ppo,
    "dpo": _dpo,
    "rloo": _ppo,
    "eval": _eval,
}
