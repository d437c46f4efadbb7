"""The files of a dataset folder or of a .zip archive, by their names relative to it."""

import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.files import DataFile, open_bytes
from rlhf_recipes.data.reading.splits import looks_like_split, natural

DEPTH = 4  # folders below the dataset folder


@dataclass(frozen=True)
class Tree:
    """A folder with data files, or an archive with them.

    Args:
        root: the folder or the archive.
        files: the names of the files below `prefix`, relative to it, with ``/``; hidden ones are left out.
        is_archive: whether `root` is a .zip archive.
        prefix: the part of the root that is looked at, such as ``data/``.
    """

    root: Path
    files: tuple[str, ...]
    is_archive: bool = False
    prefix: str = ""

    @property
    def name(self) -> str:
        """What messages call the folder."""
        return f"{self.root}/{self.prefix}".rstrip("/") if self.prefix else str(self.root)

    def file(self, name: str) -> DataFile:
        """Return the file of this name."""
        if self.is_archive:
            return DataFile(self.root, self.prefix + name)
        return DataFile(self.root / (self.prefix + name))

    def below(self, folder: str) -> "Tree":
        """Return the part of the tree below a folder."""
        start = folder.strip("/") + "/"
        files = tuple(name.removeprefix(start) for name in self.files if name.startswith(start))
        return Tree(self.root, files, self.is_archive, self.prefix + start)

    def direct(self, folder: str = "") -> list[str]:
        """Return the names of the files that lie in `folder` itself: an empty string, or a name that ends in ``/``."""
        return [name for name in self.files if name.startswith(folder) and "/" not in name[len(folder) :]]

    def folders(self, below: str = "") -> list[str]:
        """Return the names of the folders with files that lie directly below `below`."""
        inner = (name[len(below) :] for name in self.files if name.startswith(below))
        return sorted({name.split("/")[0] for name in inner if "/" in name}, key=natural)

    def json(self, name: str) -> Any:
        """Return the content of a small JSON file; None if there is none that can be read."""
        if name not in self.files:
            return None
        try:
            with open_bytes(self.file(name)) as stream:
                return json.loads(stream.read())
        except ValueError:  # UserError is one, too
            return None


def folder_tree(folder: Path) -> Tree:
    """Return the files of a folder and of the folders below it."""
    names: list[str] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = [name for name in folders if not name.startswith((".", "__"))] if depth < DEPTH else []
        names += [Path(place, name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
    return Tree(folder, tuple(sorted(names, key=natural)))


def archive_tree(path: Path) -> Tree:
    """Return the files of a .zip archive; one folder around all of them does not count.

    Raises:
        UserError: a damaged archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} cannot be unpacked: {error}; copy or download it again") from None
    tree = Tree(path, tuple(sorted(_visible(names), key=natural)), is_archive=True)
    while not tree.direct() and len(tree.folders()) == 1:
        (folder,) = tree.folders()
        if folder == "data" or looks_like_split(folder):
            break
        tree = tree.below(folder)
    return tree


def _visible(names: Iterable[str]) -> list[str]:
    return [name for name in names if not any(part.startswith((".", "__")) for part in name.split("/"))]
