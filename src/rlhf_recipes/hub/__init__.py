"""Folders to the Hugging Face Hub: only when asked, private unless told otherwise, and whole or not at all.

A folder becomes one commit, which is read back and compared, file by file, before anyone is told that it was pushed. What
fails leaves the repo as it was and the folder as it is, in one line that says how to try again.
"""

from rlhf_recipes.hub.push import ADAPTER, files_of, open_asked, push_asked, push_checkpoint, push_folder, tell
from rlhf_recipes.hub.repos import HubArguments, Repo, check_push, check_repo, open_repo

__all__ = [
    "ADAPTER",
    "HubArguments",
    "Repo",
    "check_push",
    "check_repo",
    "files_of",
    "open_asked",
    "open_repo",
    "push_asked",
    "push_checkpoint",
    "push_folder",
    "tell",
]
