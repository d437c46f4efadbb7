"""The folder that a stage leaves: its files, model card, checkpoints and lock."""

from rlhf_recipes.folders.card import HUB_ID
from rlhf_recipes.folders.checkpoints import (
    CHECKSUMS_FILE,
    STAGING_FOLDER,
    STATE_FILE,
    disk_full_as_user_error,
    find_checkpoint,
    last_checkpoint_note,
    move_files_into,
    publish,
    raise_if_disk_full,
    raise_if_out_of_memory,
)
from rlhf_recipes.folders.lock import folder_lock, require_unlocked
from rlhf_recipes.folders.output import RECIPE_FILE, check_output_folder, clear_output_folder, complete_output_folder

__all__ = [
    "CHECKSUMS_FILE",
    "HUB_ID",
    "RECIPE_FILE",
    "STAGING_FOLDER",
    "STATE_FILE",
    "check_output_folder",
    "clear_output_folder",
    "complete_output_folder",
    "disk_full_as_user_error",
    "find_checkpoint",
    "folder_lock",
    "last_checkpoint_note",
    "move_files_into",
    "publish",
    "raise_if_disk_full",
    "raise_if_out_of_memory",
    "require_unlocked",
]
