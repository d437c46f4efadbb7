"""Generation configs that can be saved again: transformers reads some that it then refuses to write."""

import logging
from typing import Any

from rlhf_recipes.core.errors import UserError

# Numbers of sampling: without do_sample they do nothing, and transformers does not save such a config.
SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

logger = logging.getLogger(__name__)


def repair_generation_config_(model: Any, name: str) -> Any:
    """Set do_sample where the model's generation config has numbers of sampling only; return the model.

    Llama 2 and Vicuna come with a temperature and without do_sample. The fault would show when the trained model is
    saved. The stages here do not sample by this config, except for its stop tokens.

    Raises:
        UserError: the config cannot be saved for another reason.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not (reason := _why_not_saved(config)):
        return model
    if not config.do_sample and any(getattr(config, option, None) is not None for option in SAMPLING_NAMES):
        config.do_sample = True
        logger.warning("generation_config.json of %s samples without do_sample; it is set to true", name)
        reason = _why_not_saved(config)
    if reason:
        raise UserError(f"generation_config.json of {name} cannot be saved again: {reason}; correct the file")
    return model


def _why_not_saved(config: Any) -> str:
    """Return the first line of what transformers says against the config, or nothing."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        lines = [line.strip(" -") for line in str(error).strip().splitlines() if line.strip()]
        return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]).rstrip(".")
    return ""
