"""Generation configs that can be saved again: transformers reads some that it then refuses to write."""

import logging
from typing import Any

# Numbers of sampling: without do_sample they do nothing, and transformers does not save such a config.
SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
TOKEN_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")

logger = logging.getLogger(__name__)


def repair_generation_config_(model: Any, name: str) -> Any:
    """Change the model's generation config so that it can be saved, with a line in the log; return the model.

    Where it has numbers of sampling only, do_sample is set: Llama 2 and Vicuna come with a temperature and without
    do_sample. Of any other config that cannot be saved the special tokens are kept. The fault would otherwise show
    when the trained model is saved. The stages here sample by the stop tokens of this config alone.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not _why_not_saved(config):
        return model
    if not config.do_sample and any(getattr(config, option, None) is not None for option in SAMPLING_NAMES):
        config.do_sample = True
        logger.warning("generation_config.json of %s samples without do_sample; it is set to true", name)
    if reason := _why_not_saved(config):
        tokens = {option: getattr(config, option) for option in TOKEN_NAMES}
        model.generation_config = type(config)(**tokens)
        logger.warning("generation_config.json of %s keeps its special tokens only: %s", name, reason)
    return model


def _why_not_saved(config: Any) -> str:
    """Return the first line of what transformers says against the config, or nothing."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        lines = [line.strip(" -") for line in str(error).strip().splitlines() if line.strip()]
        return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]).rstrip(".")
    return ""
