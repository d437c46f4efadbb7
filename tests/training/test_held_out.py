"""Means over held-out rows: batches of unequal size combined by hand, and rows shared out among processes."""

import math

import pytest

from rlhf_recipes.training.held_out import HeldOutBatch, ShareOfRows, combine_batches


def test_batches_are_weighted_by_what_they_hold() -> None:
    batches = [
        HeldOutBatch({"loss": 1.0, "accuracy": 1.0, "low": 3.0, "kl": math.nan}, {"rows": 4, "tokens": 10}),
        HeldOutBatch({"loss": 6.0, "accuracy": 0.0, "low": 2.0, "kl": 5.0}, {"rows": 1, "tokens": 30}),
        HeldOutBatch({}, {}),
    ]
    kinds = {"loss": "tokens", "accuracy": "rows", "low": "least", "kl": "rows"}
    assert combine_batches(batches, kinds) == {"loss": 4.75, "accuracy": 0.8, "low": 2.0, "kl": 5.0}


def test_the_deviation_of_parts_is_that_of_the_whole() -> None:
    import statistics

    values = [[1.0, 2.0, 4.0], [9.0], [3.0, 3.5]]
    batches = [
        HeldOutBatch(
            {"mean": statistics.fmean(part), "std": statistics.stdev(part) if len(part) > 1 else math.nan},
            {"rows": len(part)},
        )
        for part in values
    ]
    combined = combine_batches(batches, {"mean": "rows", "std": "spread mean"})
    whole = [value for part in values for value in part]
    assert combined["std"] == pytest.approx(statistics.stdev(whole)) and combined["mean"] == pytest.approx(22.5 / 6)


def test_what_nothing_measured_is_not_a_number() -> None:
    batches = [HeldOutBatch({"a": math.nan, "b": 2.0, "c": 0.0}, {"rows": 2, "ended": 0})]
    combined = combine_batches(batches, {"a": "rows", "b": "ended", "c": "least ended"})
    assert all(math.isnan(value) for value in combined.values())


@pytest.mark.parametrize("rows", range(1, 14))
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_row_is_in_one_batch_of_one_process(rows: int, processes: int) -> None:
    shares = [ShareOfRows(range(rows), 2, process, processes) for process in range(processes)]
    assert len({len(share) for share in shares}) == 1, "a forward pass may be a collective"
    assert all(batch for share in shares for batch in share)
    kept = [
        index
        for share in shares
        for number, batch in enumerate(share)
        if number not in share.fillers
        for index in batch
    ]
    assert sorted(kept) == list(range(rows))


def test_groups_stay_together() -> None:
    order = [index for index in range(3) for _ in range(4)]
    batches = [batch for process in (0, 1) for batch in ShareOfRows(order, 4, process, 2, group=4)]
    assert batches == [[0] * 4, [2] * 4, [1] * 4, [0] * 4]
