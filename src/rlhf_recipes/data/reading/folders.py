"""The splits of a dataset folder: by file, by subfolder, by subset, by README.md, or as `save_to_disk` writes them."""

from collections.abc import Iterable
from pathlib import Path

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.files import data_ending, refuse_by_name
from rlhf_recipes.data.reading.readme import listed_splits, readme_configs
from rlhf_recipes.data.reading.splits import (
    Split,
    check_shards,
    looks_like_split,
    several,
    split_in_folder,
    splits_by_file,
)
from rlhf_recipes.data.reading.tree import Tree, folder_tree

PLACES = ("", "data/")  # where split files and split folders lie


def data_splits(folder: Path, config: str | None = None) -> dict[str, list[Path]]:
    """Return the data files of each split in a dataset folder.

    Files that hold no rows (metrics.json, README, checksums, hidden ones) do not count. Without `config`, the splits of
    all subsets that README.md lists are joined.

    Raises:
        UserError: several candidates for one split, a missing shard, or several subset folders and no `config`.
    """
    tree = folder_tree(folder)
    configs = readme_configs(tree) if config is None else {}
    joined: dict[str, list[Path]] = {}
    for name in configs or [config]:
        for split, found in folder_splits(tree, name).items():
            if found.problem:
                raise UserError(f"dataset folder {tree.name} {found.problem}")
            joined.setdefault(split, []).extend(tree.file(file).path for file in found.files)
    return joined


def folder_splits(tree: Tree, config: str | None = None) -> dict[str, Split]:
    """Return the splits of a folder, or of its subset `config`, by name; the files are relative to the tree.

    Raises:
        UserError: no such subset, or several of them and none is named.
    """
    configs = readme_configs(tree)
    if configs:
        return _readme_splits(tree, configs, config)
    own = _own_splits(tree)
    if own and config is None:
        return own
    subsets = _subsets(tree)
    if config is None and len(subsets) > 1 and "default" not in subsets:
        first = next(iter(subsets))
        raise UserError(
            f"dataset folder {tree.name} has the subsets {', '.join(subsets)}; pass --dataset_config {first}, or give "
            f"the folder {tree.name}/{subsets[first]}"
        )
    if config is not None and config not in subsets:
        present = f"it has {', '.join(subsets)}" if subsets else "it has no subsets; leave --dataset_config out"
        raise UserError(f"dataset folder {tree.name} has no subset {config!r} ({present})")
    if not subsets:
        return own
    chosen = config or ("default" if "default" in subsets else next(iter(subsets)))
    return _below(subsets[chosen] + "/", _own_splits(tree.below(subsets[chosen])))


def pick_split(tree: Tree, splits: dict[str, Split], split: str) -> list[str]:
    """Return the files of one split.

    Raises:
        UserError: no such split, several candidates for it, or a missing shard.
    """
    if split not in splits:
        named = [name for found in splits.values() for name in found.files if data_ending(_base(name))[0] == split]
        if len(named) == 1:
            return named  # train_0 of train_0, train_1
        for name in tree.files:
            if _base(name).split(".")[0] == split:
                refuse_by_name(name, f"{tree.name}/{name}")
        folders = [name for name in tree.folders() if any(data_ending(file)[1] for file in tree.below(name).files)]
        if folders and not splits:
            raise UserError(
                f"dataset folder {tree.name} has no split {split!r}, but files in the folders {', '.join(folders)}; "
                "give one of these folders, or a file"
            )
        present = ", ".join(splits) or "no data files"
        raise UserError(f"dataset folder {tree.name} has no split {split!r} (it has {present}); name one of them")
    if splits[split].problem:
        raise UserError(f"dataset folder {tree.name} {splits[split].problem}")
    return list(splits[split].files)


def _readme_splits(tree: Tree, configs: dict[str, dict[str, object]], config: str | None) -> dict[str, Split]:
    defaults = [name for name, each in configs.items() if each.get("default") is True] or ["default"]
    chosen = config or (next(iter(configs)) if len(configs) == 1 else defaults[0])
    if chosen not in configs:
        wrong = f"has no subset {config!r} (it has " if config else "has several subsets ("
        raise UserError(
            f"dataset folder {tree.name} {wrong}{', '.join(configs)}); pass --dataset_config {next(iter(configs))}"
        )
    settings = configs[chosen]
    if settings.get("data_files"):
        return listed_splits(tree, settings)
    folder = str(settings.get("data_dir") or "").strip("./")
    return _below(f"{folder}/", _own_splits(tree.below(folder))) if folder else _own_splits(tree)


def _own_splits(tree: Tree) -> dict[str, Split]:
    """Return the splits of a folder without its subsets."""
    saved = _saved_splits(tree)
    if saved is not None:
        return saved
    names = [name for place in PLACES for name in tree.direct(place)]
    splits = _cached_splits(tree, names) or splits_by_file(names)
    folders = {
        place + folder: folder for place in PLACES for folder in tree.folders(place) if place + folder != "data"
    }
    if any(looks_like_split(folder) for folder in folders.values()):
        for path, folder in folders.items():
            found = _split_folder(tree, path, folder)
            if found is not None:
                splits[folder] = _joined(folder, splits.get(folder), found)
    return dict(sorted(splits.items()))


def _split_folder(tree: Tree, path: str, folder: str) -> Split | None:
    """Return the split that a folder's files are; None for a folder without rows, or with splits of another kind."""
    inner = tree.below(path)
    saved = _saved_splits(inner)
    if saved is not None:
        files = tuple(name for found in saved.values() for name in found.files)
        return Split(
            _prefixed(f"{path}/", files), next((found.problem for found in saved.values() if found.problem), "")
        )
    found = split_in_folder(folder, [f"{path}/{name}" for name in inner.direct()])
    if not looks_like_split(folder):
        own = any(data_ending(name)[1] and looks_like_split(data_ending(name)[0]) for name in inner.direct())
        return found if found.files and not own else None
    deeper = [name for name in inner.files if "/" in name and data_ending(_base(name))[1]]
    if deeper:
        return Split(
            (*found.files, *_prefixed(f"{path}/", deeper)),
            f"has data files in subfolders of {path} ({', '.join(inner.folders())}): give one of these folders, or put "
            "the files of a split into one folder",
        )
    return found if found.files else None


def _joined(split: str, one: Split | None, other: Split) -> Split:
    """Return one of two splits of the same name, or the problem that there are two."""
    if one is None or not one.files:
        return other
    return Split((*one.files, *other.files), several(split, [one.files[0], other.files[0]]))


def _saved_splits(tree: Tree) -> dict[str, Split] | None:
    """Return the splits of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; None for others."""
    saved = tree.json("dataset_dict.json")
    names = saved.get("splits") if isinstance(saved, dict) else None
    if isinstance(names, list):
        inner = {str(name): _saved_splits(tree.below(str(name))) for name in names}
        return {
            name: Split(_prefixed(f"{name}/", next(iter(found.values())).files), next(iter(found.values())).problem)
            if found
            else Split((), f"lists the split {name!r} in dataset_dict.json, but the folder is not there; copy it")
            for name, found in inner.items()
        }
    state = tree.json("state.json")
    if not isinstance(state, dict) or not isinstance(state.get("_data_files"), list):
        return None
    files = tuple(str(each.get("filename")) for each in state["_data_files"] if isinstance(each, dict))
    missing = [name for name in files if name not in tree.files]
    problem = f"misses {', '.join(missing)}, which its state.json lists; copy or download it again" if missing else ""
    if state.get("_indices_files") or state.get("_indices_data_files"):
        problem = "was saved with a selection of rows by an old version of datasets; load it there and save it again"
    split = state.get("_split")
    return {split if isinstance(split, str) and looks_like_split(split) else "train": Split(files, problem)}


def _cached_splits(tree: Tree, names: Iterable[str]) -> dict[str, Split]:
    """Return the splits of a cache folder of `datasets`: ``<builder>-train.arrow`` beside dataset_info.json."""
    info = tree.json("dataset_info.json")
    splits = info.get("splits") if isinstance(info, dict) else None
    if not isinstance(splits, dict):
        return {}
    found: dict[str, list[str]] = {}
    for name in names:
        stem, ending = data_ending(name)
        for split in splits:
            shard = stem.rpartition("-of-")[0].rpartition("-")[0] if "-of-" in stem else stem
            if ending == ".arrow" and shard.endswith(f"-{split}") and not stem.startswith("cache-"):
                found.setdefault(split, []).append(name)
    return {split: check_shards(split, files) for split, files in found.items()}


def _subsets(tree: Tree) -> dict[str, str]:
    """Return the folders that have splits, by name."""
    return {
        folder: place + folder
        for place in PLACES
        for folder in tree.folders(place)
        if folder != "data"
        and not looks_like_split(folder)
        and any(looks_like_split(split) for split in _own_splits(tree.below(place + folder)))
    }


def _below(folder: str, splits: dict[str, Split]) -> dict[str, Split]:
    return {name: Split(_prefixed(folder, found.files), found.problem) for name, found in splits.items()}


def _prefixed(folder: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(folder + name for name in names)


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1]
