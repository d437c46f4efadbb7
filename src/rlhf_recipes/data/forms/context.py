"""What converters of one source share: its columns, whether it is read as chat, and how its errors begin."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.core.errors import UserError, shortened
from rlhf_recipes.data.counts import RowCounts
from rlhf_recipes.data.forms.meanings import read_path
from rlhf_recipes.data.forms.messages import Message, holds_messages, parsed_json, to_messages
from rlhf_recipes.data.forms.survey import is_missing
from rlhf_recipes.data.forms.transcripts import is_transcript, transcript_messages

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Context:
    """One source on its way to canonical rows.

    Args:
        name: the source in messages.
        columns: meaning -> column.
        chat: prompts and answers become turns; otherwise they stay text.
        roles: names of roles that the user gave -> role.
        counts: what is dropped and why.
        separated: the prompt is an instruction, so an empty line follows it in plain text.
        written: meanings whose numbers are read as text.
    """

    name: str
    columns: Mapping[str, str]
    chat: bool
    roles: Mapping[str, str]
    counts: RowCounts
    separated: bool = False
    written: frozenset[str] = frozenset()

    def value(self, row: Mapping[str, Any], meaning: str) -> Any:
        """Return the value of a meaning in a row; None without the column or without a value."""
        value = read_path(row, self.columns[meaning]) if meaning in self.columns else None
        if is_missing(value):
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return str(value) if is_number and meaning in self.written else value

    def place(self, index: int, meaning: str) -> str:
        """Return how an error about a value begins."""
        return f"{self.name}, row {index}: the column {self.columns[meaning]}"

    def text(self, row: Mapping[str, Any], meaning: str, index: int) -> str:
        """Return a text; empty without a value.

        Raises:
            UserError: the value is something else.
        """
        value = self.value(row, meaning)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise UserError(f"{self.place(index, meaning)} holds {shortened(value)}, which is no text; give strings")
        return value

    def messages(self, row: Mapping[str, Any], meaning: str, index: int) -> list[Message]:
        """Return a list of messages; empty without a value."""
        value = self.value(row, meaning)
        return [] if value is None or value == "" else to_messages(value, self.roles, self.place(index, meaning))

    def answer(self, row: Mapping[str, Any], meaning: str, index: int) -> list[Message]:
        """Return an answer as messages: messages, a conversation in one string, or one assistant turn."""
        return self.as_answer(self.value(row, meaning), self.place(index, meaning))

    def as_answer(self, value: Any, place: str) -> list[Message]:
        """Return a value as an answer (see `answer`)."""
        if value is None or value == []:
            return []
        if holds_messages(value):
            return to_messages(value, self.roles, place)
        if not isinstance(value, str):
            raise UserError(f"{place} holds {shortened(value)}, which is no text; give strings or messages")
        if is_transcript(value):
            return transcript_messages(value)
        return [{"role": "assistant", "content": value}] if value.strip() else []

    def prompt_messages(self, row: Mapping[str, Any], index: int) -> list[Message]:
        """Return the prompt as messages: system, history, and the prompt itself with its context."""
        value = self.value(row, "prompt")
        if value is not None and holds_messages(value):
            turns = self.messages(row, "prompt", index)
        elif is_transcript(value):
            turns = transcript_messages(str(value))
        else:
            parts = [self.text(row, "prompt", index), self.text(row, "context", index)]
            text = "\n\n".join(part for part in parts if part.strip())
            turns = [{"role": "user", "content": text}] if text else []
        return self.with_system(row, index, [*self._history(row, index), *turns])

    def with_system(self, row: Mapping[str, Any], index: int, turns: list[Message]) -> list[Message]:
        """Return the turns after the system message of the row's column, if it has one."""
        system = self.text(row, "system", index)
        if not system.strip():
            return turns
        if turns and turns[0]["role"] == "system":
            if turns[0]["content"] == system:
                return turns
            raise UserError(
                f"{self.place(index, 'system')} and the messages both hold a system message; leave one out, for example "
                f"--ignore_columns {self.columns['system']}"
            )
        return [{"role": "system", "content": system}, *turns]

    def prompt_text(self, row: Mapping[str, Any], index: int) -> str:
        """Return the prompt as text; system, history and context are joined to it with empty lines."""
        history = [turn["content"] for turn in self._history(row, index)]
        system, prompt, context = (self.text(row, each, index) for each in ("system", "prompt", "context"))
        parts = [part for part in (system, *history, prompt, context) if part and part.strip()]
        alone = not parts or (parts == [prompt] and not self.separated)
        return prompt if alone else "\n\n".join(parts) + "\n\n"

    def _history(self, row: Mapping[str, Any], index: int) -> list[Message]:
        """Return earlier turns: messages, or a list of (user, assistant) pairs."""
        pairs = parsed_json(self.value(row, "history")) or []
        if holds_messages(pairs):
            return self.messages(row, "history", index)
        if isinstance(pairs, str) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            raise UserError(
                f"{self.place(index, 'history')} holds {shortened(pairs)}; give a list of pairs [user, assistant] "
                f"or messages, or pass --ignore_columns {self.columns['history']}"
            )
        return [
            {"role": role, "content": str(text)}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]

    def template_values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the chat template reads beside the messages: `tools` and `chat_template_kwargs`."""
        values = {name: parsed_json(self.value(row, name)) for name in TEMPLATE_COLUMNS if name in self.columns}
        prompt = self.value(row, "prompt")
        if isinstance(prompt, Mapping) and prompt.get("tools"):
            values["tools"] = prompt["tools"]
        return values
