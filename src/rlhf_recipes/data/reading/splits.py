"""Names of files and folders: which split they belong to, in which order, and whether something is missing."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from rlhf_recipes.data.reading.files import data_ending

SPLIT = re.compile(
    r"(train|training|test|testing|validation|valid|val|dev|eval|evaluation|h[eo]ld_?out)(\d+|[-_.].*)?", re.I
)
TRAINING = re.compile(r"(train|training)(\d+|[-_.].*)?", re.I)
HELD_OUT = re.compile(
    r"(.*[-_.])?(test|testing|validation|valid|val|dev|eval|evaluation|h[eo]ld_?out)(\d+|[-_.].*)?", re.I
)
SHARD = re.compile(r"(?P<stem>.+?)[-_.](?P<number>\d+)[-_]of[-_](?P<total>\d+)([-_.][0-9a-f]{6,})?", re.I)
NUMBERED = re.compile(r"(?P<stem>.+?)[-_.]?(?P<number>\d+)")
PART = re.compile(r"(part[-_.].*|\d+)", re.I)  # as Spark, Dask and the Hub's converter write them
COPY = re.compile(r"(?P<stem>.+?)(?: \(\d+\)| - copy.*| copy.*)", re.I)
BACKUPS = (".bak", ".old", ".orig", ".backup", ".save", ".tmp", ".temp", ".copy", ".part", ".crdownload")
# Files of datasets, models and repositories that hold no rows.
IGNORED_STEMS = set("readme license licence changelog citation notice requirements contributing authors".split())
IGNORED = set("metrics.json config.json dataset_info.json dataset_infos.json dataset_dict.json state.json".split())
DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Split:
    """The files of one split.

    Args:
        files: their names, in order.
        problem: why they cannot be read as one split; empty if they can.
    """

    files: tuple[str, ...]
    problem: str = ""


@dataclass
class _Group:
    """Files whose names differ by a number only."""

    files: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    total: int | None = None
    is_backup: bool = False

    def sort_(self) -> None:
        order = sorted(range(len(self.files)), key=lambda index: (self.numbers[index], natural(self.files[index])))
        self.files = [self.files[index] for index in order]
        self.numbers = [self.numbers[index] for index in order]


def looks_like_split(name: str) -> bool:
    """Whether a name is one that people give to splits: train, test, validation, dev, test_prefs, ..."""
    return SPLIT.fullmatch(name) is not None


def looks_held_out(name: str) -> bool:
    """Whether a name is one of a split that is not trained on: test, dev_2, imdb_validation, ..."""
    return HELD_OUT.fullmatch(name) is not None and TRAINING.fullmatch(name) is None


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts ``part-10`` after ``part-9``."""
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in DIGITS.split(name)]


def splits_by_file(names: Iterable[str]) -> dict[str, Split]:
    """Group the data files of a folder by split; the keys are sorted.

    ``train.jsonl``, ``train-00000-of-00002.parquet``, ``train_0.csv`` and, if there is nothing else, ``part-00000``.
    Files that hold no rows (README, LICENSE, checksums, hidden ones) do not count.
    """
    by_split: dict[str, dict[tuple[str, ...], _Group]] = {}
    for name in sorted(names, key=natural):
        place = _place(name)
        if place is not None:
            split, key, number, total, is_backup = place
            group = by_split.setdefault(split, {}).setdefault(key, _Group(total=total, is_backup=is_backup))
            group.files.append(name)
            group.numbers.append(number)
    parts = by_split.pop("", None)
    _separate_numbered_(by_split)
    splits = {name: _split_of(name, list(groups.values())) for name, groups in by_split.items()}
    splits = {name: split for name, split in splits.items() if split.files}
    if parts and not splits:
        return {"train": _split_of("train", list(parts.values()))}
    return dict(sorted(splits.items()))


def split_in_folder(folder: str, names: Sequence[str]) -> Split:
    """Return all data files of a split's own folder (``train/0000.jsonl``) as one split."""
    groups: dict[tuple[str, ...], _Group] = {}
    for name in sorted(names, key=natural):
        place = _place(name)
        if place is not None:
            _, key, number, total, is_backup = place
            numbered = total is not None or key[0] == "numbered"
            slot = key if numbered else ("file", name.split("/")[-1].split(".")[0])
            group = groups.setdefault(slot, _Group(total=total, is_backup=is_backup))
            group.files.append(name)
            group.numbers.append(number if numbered else 0)
    for slot, group in groups.items():
        if slot[0] == "file" and len(group.files) > 1:
            return Split(tuple(group.files), several(folder, group.files))
    endings = {data_ending(name)[1]: name for group in groups.values() for name in group.files if not group.is_backup}
    files = sorted((name for group in groups.values() for name in group.files), key=natural)
    if len(endings) > 1 or any(group.is_backup for group in groups.values()):
        return Split(tuple(files), several(folder, list(endings.values()) if len(endings) > 1 else files))
    missing = next((text for group in groups.values() if (text := _missing(folder, group))), "")
    return Split(tuple(files), missing)


def several(split: str, files: Sequence[str]) -> str:
    """Say that several files claim to be one split."""
    shown = ", ".join(files[:4]) + (", ..." if len(files) > 4 else "")
    return (
        f"has several candidates for the split {split!r}: {shown}; move away all but one, or name the one file to read"
    )


def check_shards(split: str, names: Sequence[str]) -> Split:
    """Return files that were listed on purpose as one split, in natural order; shards among them must be complete."""
    groups: dict[tuple[str, ...], _Group] = {}
    for name in names:
        place = _place(name)
        if place is not None and place[3] is not None:
            group = groups.setdefault(place[1], _Group(total=place[3]))
            group.files.append(name)
            group.numbers.append(place[2])
    return Split(tuple(names), next((text for group in groups.values() if (text := _missing(split, group))), ""))


def _place(name: str) -> tuple[str, tuple[str, ...], int, int | None, bool] | None:
    """Return the split of a file, the key of its group, its number, the number of shards, and whether it is a backup.

    The split is empty for parts that do not name one. None: no data file.
    """
    path = PurePosixPath(name)
    base, is_backup = path.name, False
    while base.endswith("~") or PurePosixPath(base).suffix.lower() in BACKUPS:
        base, is_backup = base[:-1] if base.endswith("~") else base.removesuffix(PurePosixPath(base).suffix), True
    stem, ending = data_ending(base)
    if not ending or base.startswith((".", "_")) or base.lower() in IGNORED or stem.lower() in IGNORED_STEMS:
        return None
    folder = str(path.parent)
    if copy := COPY.fullmatch(stem):
        stem, is_backup = copy["stem"], True
    if is_backup:
        return stem.split(".")[0], ("backup", name), 0, None, True
    if shard := SHARD.fullmatch(stem):
        total = int(shard["total"])
        key = ("shard", folder, shard["stem"], ending, str(total))
        return shard["stem"].split(".")[0], key, int(shard["number"]), total, False
    if PART.fullmatch(stem):
        return "", ("part", folder, ending), 0, None, False
    numbered = NUMBERED.fullmatch(stem)
    if numbered and looks_like_split(numbered["stem"]):
        return numbered["stem"], ("numbered", folder, ending), int(numbered["number"]), None, False
    return stem.split(".")[0], ("plain", folder, stem, ending), 0, None, False


def _separate_numbered_(by_split: dict[str, dict[tuple[str, ...], _Group]]) -> None:
    """Make numbered files splits by themselves where their numbers do not run 0, 1, 2 or 1, 2: then they are names."""
    for split, groups in list(by_split.items()):
        for key, group in list(groups.items()):
            group.sort_()
            first = group.numbers[0]
            counted = group.numbers == list(range(first, first + len(group.files)))
            if key[0] == "numbered" and not (counted and (first == 0 or (first == 1 and len(group.files) > 1))):
                del groups[key]
                for name in group.files:
                    own = data_ending(name.split("/")[-1])[0]
                    by_split.setdefault(own, {})[("plain", name)] = _Group([name], [0])
        if not groups:
            del by_split[split]


def _split_of(name: str, groups: Sequence[_Group]) -> Split:
    """Return the one group of a split; a problem if there are several, or if shards are missing."""
    if all(group.is_backup for group in groups):
        return Split(())
    files = [file for group in groups for file in group.files]
    if len(groups) > 1:
        return Split(tuple(files), several(name, [group.files[0] for group in groups]))
    groups[0].sort_()
    return Split(tuple(groups[0].files), _missing(name, groups[0]))


def _missing(split: str, group: _Group) -> str:
    """Say which shards are missing or double; empty if all are there."""
    if group.total is None:
        return ""
    start = 1 if group.total in group.numbers and 0 not in group.numbers else 0
    expected = range(start, start + group.total)
    absent = [number for number in expected if number not in group.numbers]
    if absent:
        shown = ", ".join(map(str, absent[:4])) + (", ..." if len(absent) > 4 else "")
        return (
            f"has {len(group.files)} of the {group.total} files of the split {split!r} ({shown} missing); "
            "copy or download the rest, or rename the files that are there"
        )
    return "" if len(group.files) == group.total else several(split, group.files)
