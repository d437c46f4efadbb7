"""Epochs that drop their last incomplete batch, so that a run is the same on any number of processes.

Each number of processes would share out an incomplete batch, and fill it up with rows of the next epoch, in another way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import RandomSampler


def complete_batch_size(args: Any, dataset: Any) -> int | None:
    """Return the rows of an optimizer step if epochs are to hold complete batches only, else None.

    args: training arguments; `global_batch_size` turns it on. dataset: needs a length, and at least one batch of rows.
    """
    batch_size = getattr(args, "global_batch_size", None)
    if batch_size is None or not hasattr(dataset, "__len__") or len(dataset) < batch_size:
        return None
    return batch_size


def complete_batches_sampler(sampler: Any, batch_size: int) -> Any:
    """Return a sampler that drops the rows, in their shuffled order, that do not fill a batch; others come back as they are."""
    if not isinstance(sampler, RandomSampler):
        return sampler
    rows = len(sampler) // batch_size * batch_size
    return RandomSampler(sampler.data_source, num_samples=rows, generator=sampler.generator)


@contextmanager
def drop_last(args: Any, enabled: bool) -> Iterator[None]:
    """Within this block, `args.dataloader_drop_last` is True if `enabled`.

    No batch is dropped by it here. Without it Accelerate takes the length of the dataset for that of the sampler, and leaves
    processes out of what is gathered over the last batch of an epoch.
    """
    configured = args.dataloader_drop_last
    args.dataloader_drop_last = configured or enabled
    try:
        yield
    finally:
        args.dataloader_drop_last = configured


@contextmanager
def keep_last(args: Any) -> Iterator[None]:
    """Within this block, `args.dataloader_drop_last` is False: an evaluation reads every row."""
    configured = args.dataloader_drop_last
    args.dataloader_drop_last = False
    try:
        yield
    finally:
        args.dataloader_drop_last = configured
