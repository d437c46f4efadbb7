"""Folders to the Hugging Face Hub: only when asked, private unless told otherwise, and whole or not at all.

A folder becomes one commit, which is read back and compared, file by file, before anyone is told that it was pushed. What
fails leaves the repo as it was and the folder as it is, in one line that says how to try again.
"""

from rlhf_recipes.hub.push import (
    ADAPTER_CONFIG,
    files_to_push,
    open_requested_repo,
    print_pushed,
    push_checkpoint,
    push_folder,
    push_if_requested,
)
from rlhf_recipes.hub.repos import HubArguments, Repo, check_push, check_repo, open_repo

__all__ = [
    "ADAPTER_CONFIG",
    "HubArguments",
    "Repo",
    "check_push",
    "check_repo",
    "files_to_push",
    "open_repo",
    "open_requested_repo",
    "print_pushed",
    "push_checkpoint",
    "push_folder",
    "push_if_requested",
]
