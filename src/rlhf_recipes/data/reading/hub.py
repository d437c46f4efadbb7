"""Datasets of the Hugging Face Hub."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.arrow_rows import MESSAGE, rows_of_columns
from rlhf_recipes.data.reading.source import Row, Source

SPLITS_IN_ERROR = re.compile(r"split.*\[(.*)\]", re.IGNORECASE)


class UnknownSplitError(UserError):
    """The dataset can be read, but it has no such split.

    available: the splits that it has, as far as they are known.
    """

    def __init__(self, message: str, available: list[str]) -> None:
        super().__init__(message)
        self.available = available


def hub_source(name: str, split: str, config: str | None, streaming: bool) -> Source:
    """Open a split of a Hub dataset; see `load_hub`."""
    dataset = load_hub(name, split, config, streaming)
    features = dict(dataset.features or {})
    first = None if features else next(iter(dataset), None)
    messages = [column for column, feature in features.items() if _stores_messages(feature)]

    def read() -> Iterator[Row]:
        for row in dataset:
            yield (
                {**row, **{column: rows_of_columns(row[column], column) for column in messages}}
                if messages
                else dict(row)
            )

    labels = {
        column: list(feature.names) for column, feature in features.items() if type(feature).__name__ == "ClassLabel"
    }
    length = None if streaming else len(dataset)
    return Source(name, read, tuple(features or first or ()), labels, length)


def load_hub(name: str, split: str, config: str | None, streaming: bool) -> Any:
    """Return a split of a Hub dataset as a `datasets.Dataset`, or an IterableDataset; images are not decoded.

    Raises:
        UnknownSplitError: the dataset has no such split.
        UserError: it cannot be fetched.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with _without_download_counts():
            return _undecoded(load_dataset(name, config, split=split, streaming=streaming))
    except (OfflineModeIsEnabled, ConnectionError, DatasetNotFoundError, FileNotFoundError) as error:
        reason = "HF_HUB_OFFLINE=1 allows no request to the Hub" if _offline() else str(error).strip().splitlines()[0]
        raise UserError(
            f"dataset {name} is no local file or folder, and as a Hub id it cannot be fetched: {reason}; "
            "give a local path"
        ) from None
    except DatasetGenerationError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"dataset {name} cannot be read: {reason}; download its files and give the folder") from None
    except ValueError as error:
        text = str(error).strip()
        known = SPLITS_IN_ERROR.search(text.splitlines()[0])
        if known or text.startswith("Unknown split"):
            available = [each.strip(" '\"") for each in known[1].split(",")] if known else []
            present = f" (it has {', '.join(available)})" if available else ""
            raise UnknownSplitError(
                f"dataset {name} has no split {split!r}{present}; name one of them", available
            ) from None
        hint = "; pass --dataset_config" if "config" in text.lower() and config is None else ""
        raise UserError(f"dataset {name}: {' '.join(text.split(chr(10))[:2])}{hint}") from None


def _undecoded(dataset: Any) -> Any:
    """Return the dataset with images, sounds and videos as they are stored: nothing is decoded or fetched."""
    for name, feature in (dataset.features or {}).items():
        if getattr(feature, "decode", None) is True:
            changed = type(feature)(decode=False)
            dataset = dataset.cast_column(name, changed)
    return dataset


def _stores_messages(feature: Any) -> bool:
    """Whether a feature is a list of messages that is stored as one list per key."""
    if not isinstance(feature, dict) or not all(
        type(each).__name__ in ("List", "LargeList") for each in feature.values()
    ):
        return False
    return any(keys <= set(feature) for keys in MESSAGE)


@contextmanager
def _without_download_counts() -> Iterator[None]:
    """Within this block `datasets` reports no loads to a server.

    ``HF_UPDATE_DOWNLOAD_COUNTS=1`` in the environment keeps the reports.
    """
    from datasets import config

    setting = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = setting and os.environ.get("HF_UPDATE_DOWNLOAD_COUNTS", "0") != "0"
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = setting


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
