"""Files of a run. Text and JSON are written atomically: readers see the old file or the new one, never a part."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 file atomically and return its path; missing parent folders are created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically and return its path. Non-finite numbers become null, because JSON has none."""
    return write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def files_by_rank(folder: Path, pattern: str) -> list[Path]:
    """Return the files ``<name>_<rank>.<suffix>`` that match, in the order of their ranks: 2 before 10."""
    return sorted(folder.glob(pattern), key=lambda path: int(path.stem.rpartition("_")[2]))


def _finite(value: Any) -> Any:
    """Return the value as JSON accepts it: NaN and infinities as None, NumPy scalars as Python numbers."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value.item() if type(value).__module__ == "numpy" else value
