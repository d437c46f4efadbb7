"""Tests of `MaskedMeans`: the same means for any split of an update, and over all processes."""

import pytest
import torch

from rlhf_recipes.core.tensors import MaskedMeans, length_mask


def test_means_over_pieces_of_any_size_equal_the_mean_over_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 5, generator=generator)
    mask = length_mask(torch.tensor([5, 1, 0, 4, 2, 5, 3]), 5)
    expected = values.double()[mask].mean().item()
    for sizes in ([7], [1] * 7, [2, 5], [3, 1, 3]):
        sums = MaskedMeans()
        for piece, part in zip(values.split(sizes), mask.split(sizes), strict=True):
            sums.add({"value": piece, "share": piece > 0}, part)
        means = sums.means()
        assert means["value"] == pytest.approx(expected, abs=1e-12)
        assert means["share"] == pytest.approx((values[mask] > 0).double().mean().item(), abs=1e-12)
        assert sums.means() == {}, "reading the means resets the sums"


def test_means_are_over_all_processes() -> None:
    """This process has tokens of 1 and 2, the other one has three tokens of 4."""
    sums = MaskedMeans()
    sums.add({"value": torch.tensor([[1.0, 2.0, torch.nan]])}, torch.tensor([[True, True, False]]))
    assert sums.means(lambda totals: totals + torch.tensor([[12.0, 3.0]]))["value"] == pytest.approx(15 / 5)


def test_the_mean_over_no_tokens_is_zero() -> None:
    sums = MaskedMeans()
    sums.add({"value": torch.full((2, 3), torch.nan)}, torch.zeros(2, 3, dtype=torch.bool))
    assert sums.means() == {"value": 0.0}


def test_saved_sums_are_restored_for_another_number_of_processes() -> None:
    """Two processes resume as three: the sums count once, and all three processes have the names."""
    saved = [MaskedMeans(), MaskedMeans()]
    saved[0].add({"value": torch.tensor([1.0, 2.0])}, torch.tensor([True, True]))
    saved[1].add({"value": torch.tensor([6.0, 0.0])}, torch.tensor([True, False]))
    states, resumed = [sums.state() for sums in saved], [MaskedMeans(), MaskedMeans(), MaskedMeans()]
    for process, sums in enumerate(resumed):
        sums.restore(states, torch.device("cpu"), include_sums=process == 0)
    totals = sum(sums._sums["value"] for sums in resumed)
    assert resumed[2].means(lambda own: own * 0 + totals)["value"] == pytest.approx(9 / 3)
