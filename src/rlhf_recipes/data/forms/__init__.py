"""From rows as people have them to canonical rows: text, messages, prompts and answers, preferences, labels, prompts."""

from rlhf_recipes.data.forms.formats import COMPLETION, LABEL, MESSAGES, PREFERENCE, PROMPT, TEXT
from rlhf_recipes.data.forms.load import LoadedRows, load_rows, load_split_rows, load_texts, text_options
from rlhf_recipes.data.forms.options import FormOptions

__all__ = [
    "COMPLETION",
    "LABEL",
    "MESSAGES",
    "PREFERENCE",
    "PROMPT",
    "TEXT",
    "FormOptions",
    "LoadedRows",
    "load_rows",
    "load_split_rows",
    "load_texts",
    "text_options",
]
