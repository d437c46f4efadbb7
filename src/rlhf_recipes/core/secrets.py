"""What is never written down: the token of the Hub, in a recipe, a card, a log or an error."""

import os
import re
from collections.abc import Sequence

SECRET_ARGUMENTS = frozenset(
    {"hub_token"}
)  # arguments that hold one; eos_token and pad_token are tokens of another kind
REDACTED = "***"
_TOKEN = re.compile(r"\b(?:(?:hf|api_org)_[A-Za-z0-9]{20,}|hf_(?:oauth|jwt)_[\w.-]{16,})")
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def redact(text: str, *secrets: str | None) -> str:
    """The text with each token blotted out: those given, that of the environment, and what looks like one."""
    for secret in (*secrets, *(os.environ.get(name) for name in _VARIABLES)):
        for part in (secret or "").split():  # a token that holds a line break is quoted in pieces
            if len(part) >= 8:
                text = text.replace(part, REDACTED)
    return _TOKEN.sub(REDACTED, text)


def redact_command(words: Sequence[str]) -> list[str]:
    """The words of a command line, with what follows ``--hub_token`` blotted out."""
    told: list[str] = []
    hidden = False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = name.startswith("--") and name[2:].replace("-", "_") in SECRET_ARGUMENTS
        if secret and equals:
            word = f"{name}={REDACTED}"
        elif hidden and not word.startswith("--"):
            word = REDACTED
        hidden = (secret and not equals) or (hidden and word == REDACTED)
        told.append(redact(word))
    return told
