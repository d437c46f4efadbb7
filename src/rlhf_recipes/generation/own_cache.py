"""Sample from models that keep a state instead of keys and values, by transformers' own `generate`.

Each such architecture has its own cache, and none of them can drop a row. So the rows of a batch have the same length,
which needs no padding, and finished rows stay in it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.core.unwrapping import base_model

MIXES_ROWS = {"rwkv"}  # transformers' one-token step adds the states of all rows of a batch to each

Draw = Callable[[Tensor, int], Tensor]  # (logits, step) -> the next token of each row


def batches_of_equal_length(lengths: Sequence[int], max_rows: int) -> list[list[int]]:
    """Return batches of row indices, shortest rows first; all rows of a batch have the same length."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if not batches or len(batches[-1]) == max_rows or lengths[batches[-1][0]] != lengths[row]:
            batches.append([])
        batches[-1].append(row)
    return batches


def rows_at_once(model: Any, batch_size: int) -> int:
    """Return how many rows the model can continue in one batch: `batch_size`, or 1 where its rows would mix."""
    return 1 if base_model(model).config.model_type in MIXES_ROWS else batch_size


def generate_equal_rows(
    model: Any, prompts: Sequence[Sequence[int]], draw: Draw, max_new_tokens: int, stop_ids: tuple[int, ...]
) -> list[list[int]]:
    """Continue prompts of equal length; each answer ends with its stop token, or has `max_new_tokens` tokens."""
    base = base_model(model)
    ids = torch.tensor([list(prompt) for prompt in prompts], device=next(base.parameters()).device)
    with _only_stop_ids(base, stop_ids):
        rows = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            logits_processor=[_Drawn(draw, ids.shape[1])],
        )
    return [_up_to_stop(row, stop_ids) for row in rows[:, ids.shape[1] :].tolist()]


class _Drawn:
    """A logits processor that leaves the drawn token of each row as the only one; `generate` takes the likeliest."""

    def __init__(self, draw: Draw, prompt_length: int) -> None:
        self.draw, self.prompt_length = draw, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self.draw(scores, input_ids.shape[1] - self.prompt_length)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)


@contextmanager
def _only_stop_ids(model: Any, stop_ids: tuple[int, ...]) -> Iterator[None]:
    """Within this block, the model's generation config has stop tokens only."""
    from transformers import GenerationConfig

    previous = model.generation_config
    stops = list(stop_ids) or None
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=stops[0] if stops else 0)
    try:
        yield
    finally:
        model.generation_config = previous


def _up_to_stop(row: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    end = next((index for index, token in enumerate(row) if token in stop_ids), len(row) - 1)
    return row[: end + 1]
