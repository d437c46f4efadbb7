"""Means of an update: the same for any way of cutting it, and over all processes."""

import pytest
import torch

from rlhf_recipes.core.tensors import MaskedMeans, length_mask


def test_means_over_pieces_of_any_size_equal_the_mean_over_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 5, generator=generator)
    mask = length_mask(torch.tensor([5, 1, 0, 4, 2, 5, 3]), 5)
    expected = values.double()[mask].mean().item()
    for sizes in ([7], [1] * 7, [2, 5], [3, 1, 3]):
        tally = MaskedMeans()
        for piece, part in zip(values.split(sizes), mask.split(sizes), strict=True):
            tally.add({"here": piece, "share": piece > 0}, part)
        means = tally.means()
        assert means["here"] == pytest.approx(expected, abs=1e-12)
        assert means["share"] == pytest.approx((values[mask] > 0).double().mean().item(), abs=1e-12)
        assert tally.means() == {}, "a tally that was read is empty"


def test_means_are_over_all_processes() -> None:
    """Another process has added three tokens of 4; here there are two, 1 and 2."""
    tally = MaskedMeans()
    tally.add({"here": torch.tensor([[1.0, 2.0, torch.nan]])}, torch.tensor([[True, True, False]]))
    assert tally.means(lambda totals: totals + torch.tensor([[12.0, 3.0]]))["here"] == pytest.approx(15 / 5)


def test_the_mean_over_no_tokens_is_zero() -> None:
    tally = MaskedMeans()
    tally.add({"here": torch.full((2, 3), torch.nan)}, torch.zeros(2, 3, dtype=torch.bool))
    assert tally.means() == {"here": 0.0}


def test_saved_sums_are_restored_for_another_number_of_processes() -> None:
    """Two processes go on as three: the sums are counted once, and all of them know the names."""
    held = [MaskedMeans(), MaskedMeans()]
    held[0].add({"here": torch.tensor([1.0, 2.0])}, torch.tensor([True, True]))
    held[1].add({"here": torch.tensor([6.0, 0.0])}, torch.tensor([True, False]))
    states, later = [tally.state() for tally in held], [MaskedMeans(), MaskedMeans(), MaskedMeans()]
    for process, tally in enumerate(later):
        tally.restore(states, torch.device("cpu"), counts=process == 0)
    totals = sum(tally._sums["here"] for tally in later)
    assert later[2].means(lambda mine: mine * 0 + totals)["here"] == pytest.approx(9 / 3)
