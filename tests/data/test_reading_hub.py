"""Datasets of the Hub, without a network: what is returned for a dataset that `load_dataset` finds."""

from typing import Any

import datasets
import pytest

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading import open_source, open_test_source

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["bad", "good"]),
        "image": datasets.Image(),
        "messages": {
            "role": datasets.List(datasets.Value("string")),
            "content": datasets.List(datasets.Value("string")),
        },
    }
)
STORED = {"bytes": None, "path": "http://example.org/leak.png"}
ROW = {"text": "a", "label": 1, "image": STORED, "messages": {"role": ["user"], "content": ["b"]}}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hub with one dataset, as its splits; a split may be an exception."""
    splits: dict[str, Any] = {}

    def load_dataset(name: str, config: Any, split: str, streaming: bool) -> Any:
        if split not in splits:
            if streaming:
                raise ValueError(f"Bad split: {split}. Available splits: {list(splits)}")
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        if isinstance(splits[split], Exception):
            raise splits[split]
        return splits[split].to_iterable_dataset() if streaming else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return splits


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_read_without_decoding(hub: dict[str, Any], streaming: bool) -> None:
    """A decoded image would be fetched, and tests reach no other machine."""
    hub["train"] = datasets.Dataset.from_list([ROW] * 3, features=FEATURES)
    source = open_source("me/rows", "train", streaming=streaming)
    assert list(source) == [ROW | {"messages": [{"role": "user", "content": "b"}]}] * 3 == list(source)
    assert source.columns == tuple(ROW) and source.label_names == {"label": ["bad", "good"]}
    assert source.length == (None if streaming else 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_only_an_absent_split_means_no_held_out_rows(hub: dict[str, Any], streaming: bool) -> None:
    hub["train"] = datasets.Dataset.from_list([{"text": "a"}])
    assert open_test_source("me/rows", streaming=streaming) is None
    with pytest.raises(UserError, match=r"no split 'heldout' \(it has train\)"):
        open_test_source("me/rows", "heldout", streaming=streaming)
    hub["validation"] = hub["train"]
    with pytest.raises(UserError, match="--dataset_test_split validation"):
        open_test_source("me/rows", streaming=streaming)
    hub["test"] = ConnectionError("the line is down")
    with pytest.raises(UserError, match="cannot be fetched"):
        open_test_source("me/rows", streaming=streaming)


def test_errors_of_the_hub_are_one_line(hub: dict[str, Any]) -> None:
    hub["train"] = ValueError(
        "Config name is missing.\nPlease pick one among the available configs: ['en', 'zh']\nExample"
    )
    with pytest.raises(UserError, match=r"pick one among .*\['en', 'zh'\]; pass --dataset_config") as caught:
        open_source("me/rows", "train")
    assert "\n" not in str(caught.value)
    hub["train"] = datasets.Dataset.from_list([{"text": "a"}]).select([])
    with pytest.raises(UserError, match="has no rows"):
        open_source("me/rows", "train")
