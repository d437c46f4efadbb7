"""The card of a folder: what it was made of, the command, what was asked, what was measured, and what it is not.

Names, values and words that come from data or from the command line stay what they are: none becomes markup.
"""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.core.markdown import code_span, escape_markdown, front_matter, longest_backticks
from rlhf_recipes.core.secrets import redact_command

HUB_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]{0,95}", re.ASCII)
DATASET_ROLES = (
    "text",
    "demonstrations",
    "preferences",
    "judgements",
    "prompts",
)  # the roles of parents that are datasets

_ONE_RUN = "The numbers are those of this one run, on the data named above and on nothing else."
_ANSWERS = (
    "It has learnt to imitate or to please what it was given and has not been tested for safety: it states falsehoods "
    "with confidence, and can repeat what is rude, private or wrong in its data."
)
LIMITATIONS = {
    "tokenizer": "It is as good as the text it was learnt from is like yours: other languages, or code, take more tokens.",
    "pretrain": f"{_ONE_RUN} It continues text, whatever text that is, and has not been tested for safety.",
    "reward": f"{_ONE_RUN} A reward model overrates something, and a policy that is trained on it for long finds out what.",
    **dict.fromkeys(("sft", "dpo"), f"{_ONE_RUN} {_ANSWERS}"),
    **dict.fromkeys(
        ("ppo", "rloo"),
        f"{_ONE_RUN} A higher score is what the reward says, not yet a better answer: read some. {_ANSWERS}",
    ),
}


def model_card(
    stage: str,
    title: str,
    parents: Mapping[str, str | None],
    metrics: Mapping[str, Any],
    recipe: str,
    images: Sequence[str],
    notes: str,
    library: str = "transformers",
) -> str:
    """The README.md of a folder, as the Hub shows it. notes: Markdown of the stage's own."""
    rows = [
        f"| {escape_markdown(key)} | {_number(value)} |" for key, value in metrics.items() if isinstance(value, _SHOWN)
    ]
    command = shlex.join(redact_command([Path(sys.argv[0]).name, *sys.argv[1:]]))
    lines = [front_matter(library_name=library, tags=["rlhf-recipes", stage], **_ancestry(parents)), f"# {title}", ""]
    lines += [f"Left by the `{stage}` stage of rlhf-recipes.", ""]
    lines += [f"- {escape_markdown(role)}: {code_span(source)}" for role, source in parents.items() if source]
    lines += ["", f"Command: {code_span(command)}", ""] + ([notes, ""] if notes else [])
    lines += ["| metric | value |", "|---|---|", *rows, ""] if rows else []
    lines += [f"![{image}]({image})" for image in images]
    lines += ["", "## Limits", "", LIMITATIONS[stage], ""] if stage in LIMITATIONS else []
    fence = "`" * max(3, longest_backticks(recipe) + 1)
    lines += ["", "What was asked (`recipe.yaml`):", "", f"{fence}yaml", recipe.rstrip(), fence, ""]
    return "\n".join(lines)


_SHOWN = (int, float, str)


def _ancestry(parents: Mapping[str, str | None]) -> dict[str, Any]:
    """What the Hub links to: the base model and the datasets, where they are repos rather than somebody's folders."""
    models = [_repo(name) for name in _names(parents.get("model"))]
    datasets = [_repo(name) for role in DATASET_ROLES for name in _names(parents.get(role))]
    found: dict[str, Any] = {}
    if len(models) == 1 and models[0]:
        found["base_model"] = models[0]
    if any(datasets):
        found["datasets"] = list(dict.fromkeys(filter(None, datasets)))
    return found


def _names(sources: str | None) -> list[str]:
    return [name for name in (sources or "").split(", ") if name]


def _repo(name: str) -> str | None:
    """The Hub id of a source, or None if it is a local path."""
    name = name.removesuffix("/value_model") if name.count("/") == 2 else name
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape_markdown(value) if isinstance(value, str) else str(value)
