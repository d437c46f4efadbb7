"""Write the model card of an output folder: inputs, command, metrics, limits and requested values.

Names, values and words that come from data or from the command line are escaped, so that none becomes markup.
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
    "preferences or labels",
    "prompts",
)  # roles that are datasets

_ONE_RUN = "The numbers come from one run on the data named above."
_ANSWERS = (
    "The model imitates its training data or maximizes a reward, and has not been tested for safety: it states "
    "falsehoods with confidence, and can repeat what is rude, private or wrong in its data."
)
LIMITATIONS = {
    "tokenizer": "It is efficient on text like its training text: other languages, or code, take more tokens.",
    "pretrain": f"{_ONE_RUN} The model continues any text, and has not been tested for safety.",
    "reward": f"{_ONE_RUN} Every reward model overrates some answers; a policy that trains on it for long finds them.",
    **dict.fromkeys(("sft", "dpo"), f"{_ONE_RUN} {_ANSWERS}"),
    **dict.fromkeys(
        ("ppo", "rloo"),
        f"{_ONE_RUN} A higher reward does not prove better answers: read some. {_ANSWERS}",
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
    """Return the README.md of an output folder, in the form of a Hub model card.

    Args:
        stage: name of the stage that writes the folder.
        title: heading of the card.
        parents: for each role, such as "model" or "prompts", the folders or Hub ids that were read.
        metrics: measured values; only numbers and strings are shown.
        recipe: content of recipe.yaml.
        images: file names of plots in the folder.
        notes: Markdown that the stage adds.
        library: name of the library that loads the folder.
    """
    rows = [
        f"| {escape_markdown(key)} | {_format_value(value)} |"
        for key, value in metrics.items()
        if isinstance(value, _SHOWN_TYPES)
    ]
    command = shlex.join(redact_command([Path(sys.argv[0]).name, *sys.argv[1:]]))
    lines = [front_matter(library_name=library, tags=["rlhf-recipes", stage], **_links(parents)), f"# {title}", ""]
    lines += [f"Created by the `{stage}` stage of rlhf-recipes.", ""]
    lines += [f"- {escape_markdown(role)}: {code_span(source)}" for role, source in parents.items() if source]
    lines += ["", f"Command: {code_span(command)}", ""] + ([notes, ""] if notes else [])
    lines += ["| metric | value |", "|---|---|", *rows, ""] if rows else []
    lines += [f"![{image}]({image})" for image in images]
    lines += ["", "## Limits", "", LIMITATIONS[stage], ""] if stage in LIMITATIONS else []
    fence = "`" * max(3, longest_backticks(recipe) + 1)
    lines += ["", "Requested values (`recipe.yaml`):", "", f"{fence}yaml", recipe.rstrip(), fence, ""]
    return "\n".join(lines)


_SHOWN_TYPES = (int, float, str)


def _links(parents: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the front matter for the base model and datasets, which the Hub links; local folders are left out."""
    models = [_hub_id(name) for name in _names(parents.get("model"))]
    datasets = [_hub_id(name) for role in DATASET_ROLES for name in _names(parents.get(role))]
    links: dict[str, Any] = {}
    if len(models) == 1 and models[0]:
        links["base_model"] = models[0]
    if any(datasets):
        links["datasets"] = list(dict.fromkeys(filter(None, datasets)))
    return links


def _names(sources: str | None) -> list[str]:
    return [name for name in (sources or "").split(", ") if name]


def _hub_id(name: str) -> str | None:
    """Return the Hub id of a source, or None if it is a local path."""
    name = name.removesuffix("/value_model") if name.count("/") == 2 else name
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape_markdown(value) if isinstance(value, str) else str(value)
