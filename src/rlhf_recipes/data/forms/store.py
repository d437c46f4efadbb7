"""Canonical rows as a dataset: in memory while they are few, in a temporary file otherwise. Nothing is cached."""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.forms.survey import Column, survey
from rlhf_recipes.data.reading import Source

if TYPE_CHECKING:
    from rlhf_recipes.data.forms.understand import Understood

Row = dict[str, Any]
IN_MEMORY = 256 * 2**20  # bytes
ROWS_PER_BATCH = 1000


def canonical_features(form: str, sources: "Sequence[Understood]") -> Any:
    """Return the features of the canonical rows of all sources, with the columns that are passed on.

    Messages are JSON, since their keys differ from row to row.
    """
    from datasets import Features, Json, List, Value

    types = {
        "text": Value("string"),
        "messages": List(Json()),
        "ids": List(Value("int64")),
        "label": Value("int64"),
        "number": Value("float64"),
        "json": Json(),
    }
    passed_on = dict.fromkeys(name for source in sources for name in source.kept)
    features = {name: _type_of([source.kept[name] for source in sources if name in source.kept]) for name in passed_on}
    fields = {name: kind for source in sources for name, kind in source.fields.items()}
    if form == "messages":  # also of sources whose prompts and answers are joined to conversations
        fields = {name: kind for name, kind in fields.items() if name not in ("prompt", "completion")}
        fields["messages"] = "messages"
    return Features(features | {name: types[kind] for name, kind in fields.items()})


def raw_features(source: Source) -> Any:
    """Return the features of a source's own columns."""
    from datasets import Features

    return Features({name: _type_of([column]) for name, column in survey(source).items()})


def _type_of(columns: Sequence[Column]) -> Any:
    """Return the type of a column that is passed on: that of its values, JSON where they differ."""
    from datasets import Json, List, Value

    kinds = {kind for column in columns for kind in column.kinds}
    if kinds == {"text"} or not kinds:
        return Value("string")
    if kinds == {"bool"}:
        return Value("bool")
    if kinds == {"integers"}:
        return List(Value("int64"))
    if kinds == {"number"}:
        return Value("int64") if all(column.whole for column in columns) else Value("float64")
    return Json()


def store_rows(rows: Callable[[], Iterator[Row]], features: Any) -> Any:
    """Return the rows as a `Dataset`; None without rows."""
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    folder = Path(tempfile.mkdtemp(dir=_temporary_folder()))
    path, iterator = folder / "rows.arrow", rows()
    written = 0
    with ArrowWriter(features=features, path=str(path)) as writer:
        while batch := list(islice(iterator, ROWS_PER_BATCH)):
            columns = {name: [row.get(name) for row in batch] for name in features}
            writer.write_table(Dataset.from_dict(columns, features=features).data.table)
            written += len(batch)
        writer.finalize()
    small = path.stat().st_size <= IN_MEMORY
    dataset = Dataset.from_file(str(path), in_memory=small) if written else None
    if small:
        shutil.rmtree(folder)
    return dataset


def stream_rows(rows: Callable[[], Iterator[Row]], features: Any) -> Any:
    """Return the rows as an `IterableDataset`."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(rows, features=features)


@cache
def _temporary_folder() -> str:
    """Return a folder that is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="rlhf-recipes-rows-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
