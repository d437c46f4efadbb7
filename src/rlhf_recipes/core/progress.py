"""Progress bars of loops that are deep inside a call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], object]


@contextmanager
def progress_bar(total: int, label: str, unit: str, show: bool = True) -> Iterator[Advance]:
    """Within this block, a bar that the yielded function advances; without `show` there is none."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=label, unit=unit, disable=not show) as bar:
        yield bar.update
