"""The folder that a stage leaves: its files, model card, checkpoints and lock."""

from rlhf_recipes.folders.card import HUB_ID
from rlhf_recipes.folders.checkpoints import (
    STAGING,
    STATE,
    SUMS,
    full_disk_said,
    last_of,
    move_in,
    publish,
    resume_point,
    say_if_full,
    say_if_out_of_memory,
)
from rlhf_recipes.folders.lock import folder_lock, require_unlocked
from rlhf_recipes.folders.output import MARK, check_output_folder, leave_folder, prepare_output_folder

__all__ = [
    "HUB_ID",
    "MARK",
    "STAGING",
    "STATE",
    "SUMS",
    "check_output_folder",
    "folder_lock",
    "full_disk_said",
    "last_of",
    "leave_folder",
    "move_in",
    "prepare_output_folder",
    "publish",
    "require_unlocked",
    "resume_point",
    "say_if_full",
    "say_if_out_of_memory",
]
