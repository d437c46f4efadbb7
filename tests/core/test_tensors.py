"""Masked arithmetic against NumPy in float64, and two shards against one batch."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_recipes.core.tensors import (
    batches_by_length,
    length_mask,
    log_probs_and_entropies,
    masked_mean,
    masked_sum,
    masked_whiten,
    pad,
    position_ids,
)

LENGTHS = torch.tensor([4, 1, 0, 3, 2, 4])


def sample_values() -> tuple[Tensor, Tensor]:
    """Return values and their mask; the values are NaN wherever the mask is False."""
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5
    mask = length_mask(LENGTHS, 4)
    return values.where(mask, torch.nan), mask


def on_two_ranks(function: Callable[..., Any], shards: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """Call `function(values, mask, reduce)` for two shards at once, one thread each; `reduce` sums over both threads."""
    barrier = threading.Barrier(2, timeout=20)
    tensors: list[Any] = [None, None]
    results: list[Any] = [None, None]

    def run(rank: int) -> None:
        def reduce(tensor: Tensor) -> Tensor:
            tensors[rank] = tensor
            barrier.wait()
            total = tensors[0] + tensors[1]
            barrier.wait()
            return total

        results[rank] = function(*shards[rank], reduce)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_masked_sum_and_mean_ignore_masked_positions() -> None:
    values, mask = sample_values()
    selected = values.numpy()[mask.numpy()]
    assert masked_sum(values, mask).item() == pytest.approx(selected.sum())
    assert masked_mean(values, mask).item() == pytest.approx(selected.mean())
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0.0


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_gives_unit_variance(shift_mean: bool) -> None:
    values, mask = sample_values()
    selected = values.numpy()[mask.numpy()]
    expected = (selected - selected.mean()) / selected.std(ddof=1) + (0 if shift_mean else selected.mean())
    whitened = masked_whiten(values, mask, shift_mean=shift_mean)
    np.testing.assert_allclose(whitened.numpy()[mask.numpy()], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("split_at", [1, 2, 4])
def test_whitening_two_shards_equals_whitening_one_batch(shift_mean: bool, split_at: int) -> None:
    values, mask = sample_values()
    expected = masked_whiten(values, mask, shift_mean=shift_mean)
    shards = list(zip(values.tensor_split([split_at]), mask.tensor_split([split_at]), strict=True))
    whitened = on_two_ranks(lambda v, m, reduce: masked_whiten(v, m, shift_mean, reduce), shards)
    torch.testing.assert_close(torch.cat(whitened)[mask], expected[mask], rtol=0, atol=1e-12)
    means = on_two_ranks(masked_mean, shards)
    assert means[0].item() == means[1].item() == pytest.approx(masked_mean(values, mask).item())


def test_whitening_does_not_scale_fewer_than_two_positions() -> None:
    one = masked_whiten(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]]))
    assert one[0, 0].item() == 0.0
    unshifted = masked_whiten(torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]]), shift_mean=False)
    assert unshifted[0, 0].item() == 3.0
    none = masked_whiten(torch.tensor([[3.0, 9.0]]), torch.zeros(1, 2, dtype=torch.bool))
    assert bool(torch.isfinite(none).all())


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_log_probs_and_entropies_use_the_tempered_softmax(temperature: float) -> None:
    logits = torch.randn(5, 3, 11, generator=torch.Generator().manual_seed(1)) * 4
    tokens = torch.randint(11, (5, 3), generator=torch.Generator().manual_seed(2))
    weights = np.exp(logits.double().numpy() / temperature)
    probabilities = weights / weights.sum(-1, keepdims=True)
    chosen = np.take_along_axis(probabilities, tokens.numpy()[..., None], -1)[..., 0]
    log_probs, entropies = log_probs_and_entropies(logits, tokens, temperature)
    np.testing.assert_allclose(log_probs, np.log(chosen), rtol=0, atol=5e-6)
    expected = -(probabilities * np.log(probabilities)).sum(-1)
    np.testing.assert_allclose(entropies, expected, rtol=0, atol=5e-6)


def test_log_probs_of_bfloat16_logits_are_float32() -> None:
    logits = (torch.randn(4, 300, generator=torch.Generator().manual_seed(3)) * 4).bfloat16()
    tokens = torch.tensor([0, 7, 99, 299])
    log_probs, entropies = log_probs_and_entropies(logits, tokens, 0.7)
    exact = torch.log_softmax(logits.double() / 0.7, dim=-1)
    assert log_probs.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), exact[torch.arange(4), tokens], rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_of_log_probs_and_entropies_match_a_float64_softmax(temperature: float) -> None:
    """3,000 rows of 300 logits are more than one chunk of rows."""
    logits = torch.randn(3000, 300, generator=torch.Generator().manual_seed(3)) * 4
    tokens = torch.randint(300, (3000,), generator=torch.Generator().manual_seed(4))
    weights = torch.randn(2, 3000, generator=torch.Generator().manual_seed(5))
    exact_logits, float32_logits = logits.double().requires_grad_(), logits.clone().requires_grad_()
    log_p = torch.log_softmax(exact_logits / temperature, dim=-1)
    expected = torch.stack([log_p[torch.arange(3000), tokens], -(log_p.exp() * log_p).sum(-1)])
    actual = torch.stack(log_probs_and_entropies(float32_logits, tokens, temperature))
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    assert exact_logits.grad is not None and float32_logits.grad is not None
    torch.testing.assert_close(float32_logits.grad.double(), exact_logits.grad, rtol=0, atol=2e-5)


def test_batches_by_length_by_hand() -> None:
    assert batches_by_length([5, 1, 3, 2, 9, 1], 3, 8) == [[1, 5, 3], [2], [0], [4]], (
        "at most three rows and eight tokens"
    )
    assert batches_by_length([9, 9], 4, 8) == [[0], [1]], "a batch of one row may be longer"
    assert batches_by_length([], 4, 8) == []


def test_padding_to_a_multiple() -> None:
    ids, mask = pad([[5, 6, 7], [8]], value=9, multiple=4)
    assert ids.tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]] and mask.sum(1).tolist() == [3, 1]


def test_padding_on_the_right_and_on_the_left() -> None:
    rows = [[5, 6, 7], [], [8]]
    ids, mask = pad(rows, value=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 9], [8, 9, 9]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    ids, mask = pad(rows, value=9, side="left")
    assert ids.tolist() == [[5, 6, 7], [9, 9, 9], [9, 9, 8]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [False, False, True]]
    assert [tensor.shape for tensor in pad([[], []], value=0)] == [(2, 0), (2, 0)]
    assert [tensor.shape for tensor in pad([], value=0)] == [(0, 0), (0, 0)]


def test_position_ids_count_real_tokens_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    assert position_ids(mask)[0, 2:].tolist() == [0, 1, 2]
    assert position_ids(mask)[1, :3].tolist() == [0, 1, 2]
    assert bool((position_ids(mask) >= 0).all())
    assert length_mask(torch.tensor([0, 2]), 3).tolist() == [[False] * 3, [True, True, False]]
