"""Epochs of whole batches, so that a run is the same on any number of processes."""

from typing import Any

from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer


class WholeBatchesTrainer(Trainer):
    """With `global_batch_size`, an epoch leaves out what of the rows, in their new order, fills no batch.

    Each number of processes would share such a rest out, and fill it up with rows from the beginning, in another way.
    """

    def _batch(self) -> int | None:
        """Rows of an optimizer step that an epoch is cut into; None where it is not."""
        batch, rows = getattr(self.args, "global_batch_size", None), self.train_dataset
        return batch if batch is not None and hasattr(rows, "__len__") and len(rows) >= batch else None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler, batch = super()._get_train_sampler(*args, **kwargs), self._batch()
        if batch is None or not isinstance(sampler, RandomSampler):
            return sampler
        whole = len(sampler) // batch * batch
        return RandomSampler(sampler.data_source, num_samples=whole, generator=sampler.generator)

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's. It drops no batch but says so, since Accelerate else takes the dataset's length for the sampler's, and
        leaves processes out of what is counted over the last batch of an epoch."""
        asked = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = asked or self._batch() is not None
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = asked
