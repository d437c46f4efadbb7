"""One split of a dataset with its columns as they are; `forms` turns them into what a stage learns from."""

from itertools import islice
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.forms.store import raw_features, store_rows, stream_rows
from rlhf_recipes.data.reading import open_source


def load_split(
    name: str, split: str, *, config: str | None = None, max_samples: int | None = None, streaming: bool = False
) -> Any:
    """Load one split of a dataset with all of its columns, as a `Dataset` or, streamed, an `IterableDataset`.

    Args:
        name: a folder, a data file or a Hub id; see `open_source`.
        config: the subset of a Hub dataset or of a folder.
        max_samples: keep only so many rows, the first ones.
        streaming: read rows as they are needed.

    Raises:
        UserError: no such source or split, an unreadable or ambiguous file, an empty split, a Hub id while offline.
    """
    if max_samples is not None and max_samples < 1:
        raise UserError(f"a limit of {max_samples} samples leaves no rows; give at least 1")
    source = open_source(name, split, config=config, streaming=streaming)

    def rows() -> Any:
        return islice(iter(source), max_samples)

    return stream_rows(rows, None) if streaming else store_rows(rows, raw_features(source))
