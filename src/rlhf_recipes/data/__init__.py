"""Datasets: sources, checks of rows and columns, chat templates, prompts and packing."""

from rlhf_recipes.data.chat import (
    ROLE_TOKENS,
    bos_prefix,
    chat_template,
    ensure_chat_template_,
    is_conversation,
    plain_text,
    prompt_and_completion_ids,
    prompt_ids,
    prompt_text,
    text_ids,
)
from rlhf_recipes.data.checks import (
    check_and_fit_rows,
    keep_fitting_prompts,
    require_batch,
    require_held_out,
    require_text,
    require_texts,
)
from rlhf_recipes.data.counts import RowCounts
from rlhf_recipes.data.forms import (
    COMPLETION,
    LABEL,
    MESSAGES,
    PREFERENCE,
    PROMPT,
    TEXT,
    FormOptions,
    LoadedRows,
    load_rows,
    load_split_rows,
    load_texts,
    text_options,
)
from rlhf_recipes.data.packing import pack_documents
from rlhf_recipes.data.prompts import RESERVED_COLUMNS, Prompts, read_prompt
from rlhf_recipes.data.reading import Source, data_splits, open_source, open_test_source
from rlhf_recipes.data.rows import first_row, require_columns, write_rows
from rlhf_recipes.data.show import ShownRow, show_rows
from rlhf_recipes.data.sources import (
    load_split,
    load_test_split,
    load_train_and_test,
    load_training_sources,
)

__all__ = [
    "COMPLETION",
    "LABEL",
    "MESSAGES",
    "PREFERENCE",
    "PROMPT",
    "RESERVED_COLUMNS",
    "ROLE_TOKENS",
    "TEXT",
    "FormOptions",
    "LoadedRows",
    "Prompts",
    "RowCounts",
    "ShownRow",
    "Source",
    "bos_prefix",
    "chat_template",
    "check_and_fit_rows",
    "data_splits",
    "ensure_chat_template_",
    "first_row",
    "is_conversation",
    "keep_fitting_prompts",
    "load_rows",
    "load_split",
    "load_split_rows",
    "load_test_split",
    "load_texts",
    "load_train_and_test",
    "load_training_sources",
    "open_source",
    "open_test_source",
    "pack_documents",
    "plain_text",
    "prompt_and_completion_ids",
    "prompt_ids",
    "prompt_text",
    "read_prompt",
    "require_batch",
    "require_columns",
    "require_held_out",
    "require_text",
    "require_texts",
    "show_rows",
    "text_ids",
    "text_options",
    "write_rows",
]
