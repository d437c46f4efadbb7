"""Datasets: from a folder, a file or a Hub id to rows whose columns have been checked."""

from rlhf_recipes.data.chat import (
    ROLE_TOKENS,
    beginning_of_text,
    chat_template,
    ensure_chat_template,
    is_conversation,
    prompt_ids,
    prompt_text,
    split_ids,
    text_ids,
    text_of,
)
from rlhf_recipes.data.checks import (
    fit_prompts,
    fit_rows,
    require_batch,
    require_held_out,
    require_text,
    require_texts,
)
from rlhf_recipes.data.packing import pack_documents
from rlhf_recipes.data.prompts import TAKEN, Prompts, readable
from rlhf_recipes.data.sources import (
    data_splits,
    first_row,
    load_held_out,
    load_parts,
    load_split,
    load_train_and_test,
    require_columns,
    write_rows,
)

__all__ = [
    "ROLE_TOKENS",
    "TAKEN",
    "Prompts",
    "beginning_of_text",
    "chat_template",
    "data_splits",
    "ensure_chat_template",
    "first_row",
    "fit_prompts",
    "fit_rows",
    "is_conversation",
    "load_held_out",
    "load_parts",
    "load_split",
    "load_train_and_test",
    "pack_documents",
    "prompt_ids",
    "prompt_text",
    "readable",
    "require_batch",
    "require_columns",
    "require_held_out",
    "require_text",
    "require_texts",
    "split_ids",
    "text_ids",
    "text_of",
    "write_rows",
]
