"""What a dataset's name means: a path, taken literally, or a Hub id."""

import re
from pathlib import Path

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.files import COMPRESSIONS, FORMATS, REFUSED

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
HUB_ID = re.compile(r"(?:hf://datasets/|https?://(?:huggingface\.co|hf\.co)/datasets/)([^/]+/[^/@?#]+)(.*)")
# Names that `datasets` takes for its own readers of the files in the current folder, not for a dataset.
BUILDERS = set(
    "csv json pandas parquet arrow text conll imagefolder audiofolder videofolder meshfolder pdffolder niftifolder "
    "webdataset xml hdf5 eval lance tsfile iceberg vortex mmcif pdb genbank fasta fastq harbor sql generator spark "
    "cache folder_based_builder".split()
)


def local_path(name: str) -> Path | None:
    """Return the file or folder that a dataset's name means; None for a Hub id.

    Raises:
        UserError: neither of them; the message says what to give.
    """
    if not name.strip():
        raise UserError("no dataset; pass --dataset_name with a folder, a data file or a Hub id")
    try:
        path = Path(name).expanduser()
        if path.is_file() or path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"dataset {name[:80]}: {error}; check the path") from None
    if exists:
        raise UserError(f"dataset {name} is a pipe or device, which can be read only once; save it as a file")
    _refuse_other_names(name)
    return None


def _refuse_other_names(name: str) -> None:
    """Raise UserError for what is neither a path nor a Hub id."""
    if match := HUB_ID.match(name):
        rest = "" if match[2].strip("/") in ("", "viewer") else ", or download that file and give its path"
        raise UserError(f"dataset {name} is an address; give the Hub id {match[1]}{rest}")
    if URL.match(name):
        raise UserError(f"dataset {name} is an address; download it and give the path of the file")
    if name.lower() in BUILDERS:
        raise UserError(
            f"dataset {name} is the name of a format, and no file or folder here has this name; give the path of the "
            "data, such as --dataset_name path/to/file"
        )
    if any(sign in name for sign in "*?["):
        raise UserError(
            f"dataset {name}: no such file or folder, and patterns are not expanded; give a folder, or one file as "
            "--dataset_name and the others as --extra_dataset_names"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or _has_file_ending(name):
        raise UserError(f"dataset {name}: no such file or folder; check the path")


def _has_file_ending(name: str) -> bool:
    """Whether the name ends as a data file does. Other dots may be part of a repo's name."""
    return any(suffix.lower() in {*FORMATS, *COMPRESSIONS, *REFUSED} for suffix in Path(name).suffixes[-2:])
