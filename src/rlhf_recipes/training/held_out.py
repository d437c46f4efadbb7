"""Means over the held-out rows: the same numbers for any batch size and any number of processes.

`Trainer` and TRL average the means of batches, so a short last batch weighs as much as a full one, and a row that fills
up the last batch of several processes counts twice.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from rlhf_recipes.system import this_process_only

ROWS, LEAST, GREATEST, SPREAD = "rows", "least", "greatest", "spread"


class HeldOutBatch(NamedTuple):
    """What one process measured on one batch: means by name, and how much of each kind (rows, tokens) they are over."""

    means: Mapping[str, float]
    counts: Mapping[str, float]


class ShareOfRows(Sampler[list[int]]):
    """Batches of indices for one process: every process has equally many batches, and no row is in two of them.

    A process without rows in the last round gets the first rows again; `fillers` holds the number of that batch.

    Args:
        order: the indices of all processes together.
        batch_size: rows of a process in a batch.
        group: rows that must stay together; it divides batch_size.
    """

    def __init__(self, order: Sequence[int], batch_size: int, process: int, processes: int, group: int = 1) -> None:
        starts = range(process * batch_size, len(order) + process * batch_size, batch_size * processes)
        batches = [list(order[start : start + batch_size]) for start in starts]
        self.fillers = {number for number, rows in enumerate(batches) if not rows}
        self.batches = [rows or list(order[:group]) for rows in batches]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def combine_batches(batches: Sequence[HeldOutBatch], kinds: Mapping[str, str]) -> dict[str, float]:
    """Combine the means of batches to means over all of their rows, or tokens.

    A value that is not a number (nothing was measured in that batch) is left out.

    Args:
        batches: of all processes.
        kinds: for each name the count that weights it; or LEAST or GREATEST of the batches, of those that hold some of a
            named count; or ``SPREAD mean``: the unbiased standard deviation of the values whose mean has that name.
    """
    combined = {}
    for name in dict.fromkeys(name for batch in batches for name in batch.means):
        kind, _, other = kinds[name].partition(" ")
        measured = [batch for batch in batches if not math.isnan(batch.means.get(name, math.nan))]
        if kind == SPREAD:
            weight = kinds[other]
            combined[name] = _pooled_deviation(
                [(each.means[name], each.counts[weight], each.means[other]) for each in batches if name in each.means]
            )
        elif kind in (LEAST, GREATEST):
            values = [batch.means[name] for batch in measured if batch.counts[other or ROWS]]
            combined[name] = (min if kind == LEAST else max)(values, default=math.nan)
        else:
            weights = [batch.counts[kinds[name]] for batch in measured]
            total = math.fsum(batch.means[name] * weight for batch, weight in zip(measured, weights, strict=True))
            combined[name] = total / math.fsum(weights) if any(weights) else math.nan
    return combined


def _pooled_deviation(values: Sequence[tuple[float, float, float]]) -> float:
    """Compute the unbiased deviation of all values from (deviation, count, mean) of each batch."""
    known = [(deviation, count, mean) for deviation, count, mean in values if count and not math.isnan(mean)]
    total = math.fsum(count for _, count, _ in known)
    if total < 2:
        return math.nan
    center = math.fsum(count * mean for _, count, mean in known) / total
    within = math.fsum((count - 1) * deviation**2 for deviation, count, _ in known if count > 1)
    between = math.fsum(count * (mean - center) ** 2 for _, count, mean in known)
    return math.sqrt((within + between) / (total - 1))


class HeldOutMeans:
    """Mixin before a `Trainer`: what an evaluation logs, its loss included, is the mean over the held-out rows.

    Each process measures its own rows, and no row is measured twice. A stream of rows is shared out by Accelerate.
    """

    kinds: ClassVar[Mapping[str, str]] = {}  # what a metric is averaged over, where that is not rows
    args: Any
    accelerator: Any
    _batches: list[HeldOutBatch]
    _counts: Mapping[str, float]
    _fillers: set[int]

    def count_held_out(self, inputs: Any) -> dict[str, float]:
        """Return how much the loss's inputs hold of each kind: rows, and what `kinds` names."""
        return {ROWS: float(len(inputs["input_ids"]))}

    def kind_of(self, name: str) -> str:
        """Return what the metric of this name is averaged over (see `combine_batches`)."""
        return self.kinds.get(name, ROWS)

    @property
    def rows_per_group(self) -> int:
        """How many held-out rows must be in the same process."""
        return 1

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the loader of this process's share of the held-out rows."""
        trainer: Any = super()
        rows = getattr(self, "eval_dataset", None) if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows  # type: ignore[attr-defined]
        if self.args.world_size == 1 or rows is None or isinstance(rows, IterableDataset):
            return trainer.get_eval_dataloader(eval_dataset)
        rows = trainer._remove_unused_columns(rows, description="Evaluation")
        order = list(trainer._get_eval_sampler(rows) or range(len(rows)))
        places = (self.args.process_index, self.args.world_size)
        share = ShareOfRows(order, self.args.eval_batch_size, *places, self.rows_per_group)
        workers = self.args.dataloader_num_workers
        return DataLoader(rows, batch_sampler=share, collate_fn=self.data_collator, num_workers=workers)  # type: ignore[attr-defined]

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._batches, self._fillers = [], getattr(dataloader.batch_sampler, "fillers", set())
        trainer: Any = super()
        result = trainer.evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        several = self.args.world_size > 1
        batches = [HeldOutBatch(*each) for each in (gather_object(self._batches) if several else self._batches)]
        names = {name for batch in batches for name in batch.means}
        means = combine_batches(batches, {name: self.kind_of(name) for name in names})
        if "loss" in means:
            result.metrics[f"{metric_key_prefix}_loss"] = means.pop("loss")
        for name, mean in means.items():
            self._held_out_log()[name] = [mean]  # TRL logs the mean of this list
        return result

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.model.training:  # type: ignore[attr-defined]
            self._counts = self.count_held_out(inputs)
        trainer: Any = super()
        return trainer.compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        log = self._held_out_log()
        log.clear()
        trainer: Any = super()
        with this_process_only(self.accelerator):
            outputs = trainer.prediction_step(model, inputs, *args, **kwargs)
        means = {name: float(values[-1]) for name, values in log.items() if values}
        log.clear()
        if len(self._batches) in self._fillers:
            means, self._counts = {}, {}
        else:
            means["loss"] = float(outputs[0])
        self._batches.append(HeldOutBatch(means, self._counts))
        return outputs

    def _held_out_log(self) -> dict[str, list[float]]:
        """Return TRL's lists of what each held-out batch measured; without TRL an empty dict."""
        return getattr(self, "_metrics", {"eval": {}})["eval"]


def mask_total(mask: Tensor) -> float:
    """Return the number of positions of a mask that are on."""
    return float(torch.count_nonzero(mask))
