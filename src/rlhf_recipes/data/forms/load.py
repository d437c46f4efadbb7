"""The one door for data: from the arguments of a stage to canonical rows with counts of what happened to them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.arguments import DatasetArguments, ReadingArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.processes import log_line
from rlhf_recipes.data.counts import RowCounts
from rlhf_recipes.data.forms.context import TEMPLATE_COLUMNS
from rlhf_recipes.data.forms.convert import as_conversation
from rlhf_recipes.data.forms.formats import COMPLETION, LABEL, MESSAGES, PREFERENCE, PROMPT, TEXT
from rlhf_recipes.data.forms.options import FormOptions
from rlhf_recipes.data.forms.selection import understand_sources, understand_split
from rlhf_recipes.data.forms.store import canonical_features, store_rows, stream_rows
from rlhf_recipes.data.forms.understand import Understood

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
TRAIN, TEST = "the training split", "the held-out split"
FORMS_WITH_TEXT = (TEXT, MESSAGES, PREFERENCE, COMPLETION, LABEL, PROMPT)
TEXT_COLUMNS = ("text", "messages", "prompt", "completion", "chosen", "rejected")
REASONS = {
    "empty_rows": "are empty and are dropped",
    "empty_answers": "have an empty answer and are dropped",
    "empty_prompts": "have no prompt and are dropped",
    "without_label": "have no label and are dropped",
    "ties": "pairs are ties and are dropped",
    "few_answers": "have fewer than two answers with a score and are dropped",
    "unscored_answers": "answers have no score and are left out",
    "foreign_ends": "end with the end token of another model (such as </s>), which is taken away",
    "unequal_prompts": "compare answers to different prompts and are dropped",
}
PARTS_OF_ROWS = ("ties", "unscored_answers")


@dataclass
class LoadedRows:
    """Canonical rows of a dataset.

    form: text, messages, prompt_completion, preference, label or prompt. chat: prompts and answers are messages.
    train, test: datasets of canonical columns; test is None without a held-out split. counts: by split.
    """

    form: str
    chat: bool
    train: Any
    test: Any | None
    counts: dict[str, RowCounts] = field(default_factory=dict)

    def each_split(self, change: Callable[[Any, RowCounts], Any]) -> "LoadedRows":
        """Return the rows with `change` applied to the dataset and the counts of each split; counts how many it leaves."""
        splits = [self.train, self.test]
        for index, counts in enumerate(self.counts.values()):
            splits[index] = change(splits[index], counts)
            counts["used"] = len(splits[index])
        return replace(self, train=splits[0], test=splits[1])


def load_rows(arguments: DatasetArguments, options: FormOptions, *, streaming: bool = False) -> LoadedRows:
    """Load the training split, with the extra datasets, and the held-out split of a stage's arguments.

    Raises:
        UserError: no dataset, a source that cannot be read or understood, sources of different forms, no rows left.
    """
    train_counts, test_counts = RowCounts(TRAIN), RowCounts(TEST)
    sources, held_out = understand_sources(arguments, options, train_counts, test_counts, streaming)
    form, chat = _common_form([*sources, *held_out])
    if arguments.as_chat is None:
        _tell_of_plain_text(form, chat, options)
    if options.tokenizer is not None:
        for each in [*sources, *held_out]:
            _require_read_by_template(each, options.tokenizer)
    train = _stored(sources, form, train_counts, streaming, arguments.max_train_samples)
    test = _stored(held_out, form, test_counts, False) if held_out else None
    if form == PREFERENCE:
        _require_same_prompts(train, test)
    counts = {"train": train_counts} | ({"test": test_counts} if held_out else {})
    return LoadedRows(form, chat, train, test, counts)


def load_texts(
    arguments: DatasetArguments, text_column: str = "text", *, streaming: bool = False
) -> tuple[Iterable[str], Iterable[str] | None]:
    """Return every text of the training splits and of the held-out split: text columns, messages, prompts and answers.

    Both can be iterated again and again; nothing is held in memory. The second is None without a held-out split.
    Errors as `load_rows`.
    """
    counts = RowCounts(TRAIN), RowCounts(TEST)
    options = text_options(FormOptions(FORMS_WITH_TEXT, any_text=True), text_column)
    sources, held_out = understand_sources(arguments, options, *counts, streaming)
    limit = arguments.max_train_samples
    return Texts(sources, limit), Texts(held_out, None) if held_out else None


@dataclass(frozen=True)
class Texts:
    """The texts of some sources, at most those of the first `limit` rows."""

    sources: Sequence[Understood]
    limit: int | None

    def __iter__(self) -> Iterator[str]:
        for row in islice(chain.from_iterable(self.sources), self.limit):
            for name in TEXT_COLUMNS:
                value = row.get(name)
                if isinstance(value, str):
                    yield value
                elif value:
                    yield from (turn["content"] for turn in value if turn["content"])


def load_split_rows(
    name: str, split: str, arguments: ReadingArguments, options: FormOptions, *, config: str | None = None
) -> LoadedRows:
    """Load one split, in `train`. Errors as `load_rows`."""
    counts = RowCounts(name)
    understood = understand_split(name, split, arguments, options, counts, config)
    rows = _stored([understood], understood.form, counts, False)
    return LoadedRows(understood.form, understood.chat, rows, None, {"train": counts})


def text_options(options: FormOptions, column: str | None) -> FormOptions:
    """Return the options with `column` as the text, if it is another one than `text`."""
    return options if column in (None, "text") else replace(options, columns={**options.columns, "text": str(column)})


def _common_form(sources: Sequence[Understood]) -> tuple[str, bool]:
    """Return the form that all sources have, or are turned into, and whether it is chat.

    Raises:
        UserError: they differ; names two of them and the flag.
    """
    first = sources[0]
    forms = {each.form for each in sources}
    chats = {each.chat for each in sources}
    if forms == {COMPLETION, MESSAGES} and chats == {True}:
        return MESSAGES, True
    for each in sources[1:]:
        if each.form != first.form:
            raise UserError(
                f"{first.source.name} holds {first.form} and {each.source.name} holds {each.form}; train on one after the "
                "other, or say what the columns mean with --columns and --dataset_format"
            )
        if each.chat != first.chat:
            chat, text = (first, each) if first.chat else (each, first)
            raise UserError(
                f"{chat.source.name} holds turns of a chat and {text.source.name} plain text; pass --as_chat true to make "
                "turns of both"
            )
    return first.form, first.chat


def _stored(
    sources: Sequence[Understood], form: str, counts: RowCounts, streaming: bool, limit: int | None = None
) -> Any:
    """Return the canonical rows of all sources, one after the other, and fill in their counts."""

    features = canonical_features(form, sources)

    def rows() -> Iterator[Row]:
        for source in sources:
            for row in source:
                if "margin" in features and "margin" not in row:
                    row = row | {"margin": 0.0}  # the loss without a margin
                yield as_conversation(row) if form == MESSAGES and "completion" in row else row

    if streaming:
        return stream_rows(lambda: islice(rows(), limit), features)
    counts.clear()  # looking at the rows has counted some
    dataset = store_rows(lambda: islice(rows(), limit), features)
    dropped = [(kind, message) for kind, message in REASONS.items() if counts[kind]]
    if dataset is None:
        other = form == MESSAGES and counts["empty_answers"]
        fix = "give another dataset" + (", or say who answers with --roles assistant=NAME" if other else "")
        reasons = "; ".join(f"{counts[kind]} {message}" for kind, message in dropped)
        raise UserError(f"{sources[0].source.name} has no rows left: {reasons or 'it is empty'}; {fix}")
    counts["used"] = len(dataset)
    for kind, message in dropped:
        counts.report(kind, counts.pop(kind), message, of_rows=kind not in PARTS_OF_ROWS)
    return dataset


def _require_read_by_template(source: Understood, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse tools and template values that the chat template does not read.

    Raises:
        UserError: names the column and the flag.
    """
    template = str(tokenizer.chat_template or "")
    columns = [name for name in TEMPLATE_COLUMNS if name in source.fields and source.chat]
    for row in source.source if columns else ():
        values = source.template_values(row)
        unread = ["tools"] if values.get("tools") and "tools" not in template else []
        unread += [key for key in values.get("chat_template_kwargs") or {} if key not in template]
        if unread:
            column = "tools" if unread[0] == "tools" else "chat_template_kwargs"
            raise UserError(
                f"{source.source.name} has {column}, but the chat template of the model does not read {unread[0]}; pass "
                f"--ignore_columns {column}, or give a model whose template does"
            )


def _tell_of_plain_text(form: str, chat: bool, options: FormOptions) -> None:
    """Say that prompts and answers stay plain text beside a tokenizer that has a chat template."""
    if not chat and form in (COMPLETION, PREFERENCE, PROMPT) and getattr(options.tokenizer, "chat_template", None):
        log_line(
            "prompts and answers stay plain text, without the chat template of the model; pass --as_chat true to make them "
            "turns"
        )


def _require_same_prompts(train: Any, test: Any | None) -> None:
    """Refuse preferences of which some rows have a prompt and others none: the model would read two kinds of rows.

    Raises:
        UserError: counts both kinds.
    """
    for name, rows in ((TRAIN, train), (TEST, test)):
        if rows is not None:
            empty = sum(not prompt for prompt in rows["prompt"])
            if 0 < empty < len(rows):
                raise UserError(
                    f"{name}: {empty} of {len(rows)} pairs have no prompt and the others have one; train on one kind, or "
                    "say which column is the prompt with --columns prompt=NAME"
                )
    if test is not None and bool(train[0]["prompt"]) != bool(test[0]["prompt"]):
        first, second = (TRAIN, TEST) if train[0]["prompt"] else (TEST, TRAIN)
        raise UserError(
            f"{first} has prompts and {second} has none, so they are not of one kind; add the prompts, or pass "
            "--ignore_columns prompt"
        )
