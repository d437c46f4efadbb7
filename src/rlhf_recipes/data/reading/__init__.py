"""From files, folders and Hub ids to rows, exactly as they are written there."""

from rlhf_recipes.data.reading.folders import data_splits
from rlhf_recipes.data.reading.hub import UnknownSplitError, load_hub
from rlhf_recipes.data.reading.names import local_path
from rlhf_recipes.data.reading.open import open_source, open_test_source, require_no_test_split
from rlhf_recipes.data.reading.source import Source

__all__ = [
    "Source",
    "UnknownSplitError",
    "data_splits",
    "load_hub",
    "local_path",
    "open_source",
    "open_test_source",
    "require_no_test_split",
]
