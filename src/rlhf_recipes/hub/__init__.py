"""Push folders to the Hugging Face Hub: only on request, to a private repo by default, in one commit.

After a push the commit is read back and compared with the folder, file by file. A push that fails changes neither the
repo nor the folder, and its error message contains the command to try again.
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
from rlhf_recipes.hub.repos import HubArguments, Repo, check_push, check_repo

__all__ = [
    "ADAPTER_CONFIG",
    "HubArguments",
    "Repo",
    "check_push",
    "check_repo",
    "files_to_push",
    "open_requested_repo",
    "print_pushed",
    "push_checkpoint",
    "push_folder",
    "push_if_requested",
]
