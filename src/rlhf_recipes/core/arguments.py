"""Parse flags and a YAML file into dataclasses. Flags override the YAML file, which overrides the defaults.

A YAML line ``learning_rate: 1e-4`` is parsed exactly like the flag ``--learning_rate 1e-4``: both are validated by the
same rules and fail with the same one-line message.
"""

import dataclasses
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from rlhf_recipes.core.config_file import known_names, nearest, yaml_as_flags
from rlhf_recipes.core.conversion import without_enums
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.secrets import SECRET_ARGUMENTS
from rlhf_recipes.core.unsupported import unsupported_options

DataclassT = TypeVar("DataclassT")


@dataclass
class OutputArguments:
    """Arguments about the output folder, which every stage accepts."""

    overwrite: bool = field(
        default=False, metadata={"help": "Replace the files of an earlier run in the output folder."}
    )


@dataclass
class ReadingArguments:
    """How data files are read, and what their columns mean. Every stage that reads a dataset accepts these."""

    dataset_format: str = field(
        default="auto",
        metadata={
            "help": "Shape of the rows: text, openai, sharegpt, alpaca, prompt_completion, preference, hh, ultrafeedback, "
            "orca, kto, ranked, votes or classification. auto: decided by the columns."
        },
    )
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "Meaning of columns, as ours=theirs: prompt=question completion=answer system=system."},
    )
    ignore_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns that carry meaning and are left out on purpose."}
    )
    roles: list[str] | None = field(
        default=None, metadata={"help": "Names of roles in messages, as ours=theirs: user=human assistant=gpt."}
    )
    as_chat: bool | None = field(
        default=None,
        metadata={
            "help": "true: make plain prompts and answers turns of the chat template; false: keep them as text. "
            "Unset: as they are in the file, with a line in the log."
        },
    )
    encoding: str | None = field(
        default=None,
        metadata={"help": "Encoding of text files: utf-8, gb18030, latin-1, ... Unset: found out, or an error."},
    )
    text_by: str = field(
        default="auto",
        metadata={
            "help": "What one row of a .txt file is: line, paragraph or document. auto: a document ends at "
            "<|endoftext|> if the file has it, else one line is a row unless paragraphs are likely, which is an error."
        },
    )
    csv_columns: list[str] | None = field(
        default=None, metadata={"help": "Names of the columns of .csv and .tsv files that have no header line."}
    )


@dataclass
class DatasetArguments(ReadingArguments, OutputArguments):
    """Arguments that select the dataset rows. Every stage accepts a folder, a data file or a Hub id."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Dataset: a folder, a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, also compressed) or a "
            "Hub id."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration (subset) of a Hub dataset or of a folder."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Held-out split for evaluation. A dataset without it has no held-out rows."},
    )
    extra_dataset_names: list[str] | None = field(
        default=None, metadata={"help": "More datasets (as dataset_name) whose training rows are appended."}
    )
    row_filter: list[str] | None = field(
        default=None,
        metadata={
            "help": "Keep rows with these values, as column=value; a column named twice may have either value. "
            "A dataset without the column keeps all rows, if another dataset has the column."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Use only the first N held-out rows."})


TOO_LONG = ("drop", "cut", "error")


@dataclass
class RowLengthArguments(DatasetArguments):
    """A dataset whose rows may be longer than the model reads."""

    too_long: str | None = field(
        default=None,
        metadata={
            "help": "What happens to a row that is too long: drop it, cut it, or error. The number of such rows is logged "
            "and stands in metrics.json. Unset: the stage's own choice (see its page)."
        },
    )

    def __post_init__(self) -> None:
        check_others = getattr(super(), "__post_init__", None)  # of a further base of a stage's arguments
        if check_others is not None:
            check_others()
        if self.too_long not in (None, *TOO_LONG):
            raise UserError(f"too_long is {self.too_long!r}; choose one of {', '.join(TOO_LONG)}")


def parse_arguments(*dataclass_types: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse flags, and the YAML file of ``--config``, into one instance of each dataclass, in order.

    Each instance remembers the requested values (`requested_values`), so that the run can be recorded and repeated.

    Raises:
        UserError: unknown key (with the nearest match), wrong type, missing required value, unreadable file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(dataclass_types)
    flags, config = _split_config(argv)
    lines = yaml_as_flags(config, parser) if config else []
    defaults = {action.dest: action.default for action in parser._actions}
    for action in parser._actions:
        action.default = SUPPRESS  # the namespace then holds requested values only
    if {"-h", "--help"} & set(flags):
        for action in parser._actions:
            action.default = defaults[action.dest]
        parser.print_help()
        raise SystemExit(0)
    requested = vars(_parse_known(parser, lines + flags))
    return tuple(_instance(dataclass_type, requested) for dataclass_type in dataclass_types)


def requested_values(*instances: Any) -> dict[str, Any]:
    """Return the requested values as one flat mapping that ``--config`` can read; Hub tokens are left out.

    Instances from `parse_arguments` remember them. For other instances these are the fields that differ from their
    defaults.
    """
    requested: dict[str, Any] = {}
    for instance in instances:
        remembered = instance.__dict__.get("_requested")
        requested |= remembered if remembered is not None else _differences(instance)
    plain = {key: without_enums(value) for key, value in requested.items() if key not in SECRET_ARGUMENTS}
    return {key: value for key, value in plain.items() if _is_plain(value)}


def _differences(instance: Any) -> dict[str, Any]:
    """Return the required fields of a dataclass instance, and the fields that differ from their defaults."""
    required = {
        item.name: getattr(instance, item.name)
        for item in dataclasses.fields(instance)
        if item.init and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
    fresh = type(instance)(**required)
    return required | {
        item.name: getattr(instance, item.name)
        for item in dataclasses.fields(instance)
        if item.init and getattr(instance, item.name) != getattr(fresh, item.name)
    }


def _is_plain(value: Any) -> bool:
    """Return whether the value survives a round trip through YAML."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (str, int, float, bool))


def _parser(dataclass_types: Sequence[type]) -> Any:
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}; run with --help for the list of flags")

    parser = Parser(
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE.yaml] [--flag value ...]",
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="YAML file with any of the values below; flags override it."
    )
    for dataclass_type in dataclass_types:
        title = getattr(dataclass_type, "_argument_group_name", dataclass_type.__name__)
        group = parser.add_argument_group(title)
        hints, hidden = get_type_hints(dataclass_type), unsupported_options(dataclass_type)
        for item in dataclasses.fields(dataclass_type):
            if item.init:
                item.type = hints[item.name]
                parser._parse_dataclass_field(group, item)  # type: ignore[arg-type]
        for action in parser._actions:
            action.help = SUPPRESS if action.dest in hidden else action.help
    return parser


def _split_config(argv: list[str]) -> tuple[list[str], str | None]:
    flags, config = [], None
    position = 0
    while position < len(argv):
        word = argv[position]
        if word == "--config":
            if position + 1 == len(argv):
                raise UserError("--config needs the path of a YAML file")
            config, position = argv[position + 1], position + 2
        elif word.startswith("--config="):
            config, position = word.removeprefix("--config="), position + 1
        else:
            flags.append(word)
            position += 1
    return flags, config


def _parse_known(parser: Any, words: list[str]) -> Any:
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        word = unknown[0]
        if not word.startswith("--"):
            more = "extra_dataset_names" in known_names(parser) and Path(word).exists()
            fix = f"further datasets follow --extra_dataset_names: --extra_dataset_names {word}" if more else None
            raise UserError(f"unexpected argument {word!r}; {fix or 'values follow a --flag'}")
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        raise UserError(f"unknown flag --{name}{nearest(name, known_names(parser))}")
    return namespace


def _instance(dataclass_type: type[DataclassT], requested: dict[str, Any]) -> DataclassT:
    names = {item.name for item in dataclasses.fields(dataclass_type) if item.init}  # type: ignore[arg-type]
    fields = {key: value for key, value in requested.items() if key in names}
    try:
        instance = dataclass_type(**fields)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{dataclass_type.__name__}: {error}") from None
    instance.__dict__["_requested"] = fields
    return instance
