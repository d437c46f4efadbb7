"""Redact Hub tokens, so that none appears in a recipe, a model card, a log or an error message."""

import os
import re
from collections.abc import Sequence

SECRET_ARGUMENTS = frozenset({"hub_token"})  # eos_token and pad_token are vocabulary tokens
REDACTED = "***"
_TOKEN_PATTERN = re.compile(r"\b(?:(?:hf|api_org)_[A-Za-z0-9]{20,}|hf_(?:oauth|jwt)_[\w.-]{16,})")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def redact(text: str, *secrets: str | None) -> str:
    """Replace tokens in the text by ``***``: the given secrets, those in the environment, and what looks like one."""
    for secret in (*secrets, *(os.environ.get(name) for name in _TOKEN_VARIABLES)):
        for part in (secret or "").split():  # errors quote a token with a line break in pieces
            if len(part) >= 8:
                text = text.replace(part, REDACTED)
    return _TOKEN_PATTERN.sub(REDACTED, text)


def redact_command(words: Sequence[str]) -> list[str]:
    """Return the words of a command line, with the value of ``--hub_token`` and other tokens redacted."""
    redacted: list[str] = []
    value_is_secret = False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = name.startswith("--") and name[2:].replace("-", "_") in SECRET_ARGUMENTS
        if secret and equals:
            word = f"{name}={REDACTED}"
        elif value_is_secret and not word.startswith("--"):
            word = REDACTED
        value_is_secret = (secret and not equals) or (value_is_secret and word == REDACTED)
        redacted.append(redact(word))
    return redacted
