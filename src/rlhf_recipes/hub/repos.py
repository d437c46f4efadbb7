"""Describe, check and create the repo to push to, before a stage starts its work."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.hub.requests import api, one_line_hub_errors, require_token, status_of, with_retries


@dataclass
class HubArguments:
    """Arguments of stages that push and do not train; `TrainingArguments` has the same ones."""

    push_to_hub: bool = field(default=False, metadata={"help": "Push the folder to the Hub at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repo to push to, as owner/name."})
    hub_private_repo: bool | None = field(
        default=True,
        metadata={"help": "Create private repos and refuse to push to public ones. false: use public repos."},
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to. Unset: main."})
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub token. Unset: HF_TOKEN, or the token of `hf auth login`."}
    )


class Repo(NamedTuple):
    """A repo to push to, and the token to use. private: create it as a private repo, and refuse a public one."""

    name: str
    kind: str = "model"  # or "dataset"
    private: bool | None = True
    revision: str | None = None
    token: str | None = None

    @classmethod
    def from_arguments(cls, arguments: Any, kind: str = "model") -> "Repo":
        """Return the repo that arguments with the fields of `HubArguments` request."""
        private, revision = arguments.hub_private_repo, arguments.hub_revision
        return cls(arguments.hub_model_id or "", kind, private, revision, arguments.hub_token)

    @property
    def address(self) -> dict[str, str]:
        """The keyword arguments that name the repo in calls of huggingface_hub."""
        return {"repo_id": self.name, "repo_type": self.kind}


def check_push(arguments: Any) -> None:
    """Refuse a push that cannot succeed, before anything is loaded and without a request to the Hub.

    Raises:
        UserError: a push is requested without a valid repo id, without a token or in offline mode; or a repo id is
            given but no push is requested.
    """
    if arguments.push_to_hub:
        check_repo(Repo.from_arguments(arguments))
    elif arguments.hub_model_id is not None:
        raise UserError(
            f"hub_model_id is {arguments.hub_model_id}, but nothing is pushed without push_to_hub; pass --push_to_hub "
            "true, or leave out hub_model_id"
        )


def check_repo(repo: Repo) -> None:
    """Refuse a repo that cannot be pushed to, without a request to the Hub.

    Raises:
        UserError: the repo id is malformed, there is no token, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not repo.name:
        raise UserError("no repo to push to; pass --hub_model_id owner/name")
    try:
        validate_repo_id(repo.name)
    except HFValidationError as error:
        raise UserError(f"hub_model_id {repo.name} is no repo id ({error}); give it as owner/name") from None
    if "/" not in repo.name:
        raise UserError(f"hub_model_id {repo.name} has no owner; give it as owner/name")
    if constants.HF_HUB_OFFLINE:
        raise UserError("nothing can be pushed while HF_HUB_OFFLINE=1; unset it, or leave out --push_to_hub")
    require_token(repo.token)


def open_repo(repo: Repo) -> None:
    """Check that the repo exists and accepts writes, and create it if it does not exist.

    Raises:
        UserError: the token has no write access, the repo is public but a private one is requested, or the Hub fails.
    """
    with one_line_hub_errors(f"{repo.name} cannot be pushed to", "", repo.token):
        ensure_repo(repo)


def ensure_repo(repo: Repo) -> None:
    """Do the work of `open_repo`; errors of huggingface_hub are raised as they are."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = api(repo.token)
    try:
        public = not with_retries(lambda: hub.repo_info(**repo.address)).private
    except RepositoryNotFoundError as error:
        if status_of(error) == 401:
            raise
        with_retries(lambda: hub.create_repo(**repo.address, private=repo.private, exist_ok=True))
        public = False
    if public and repo.private:
        raise UserError(
            f"{repo.name} is public on the Hub, but a private repo is requested; pass --hub_private_repo false to "
            "push there, or give another --hub_model_id"
        )
    if repo.revision not in (None, "main"):
        with_retries(lambda: hub.create_branch(**repo.address, branch=str(repo.revision), exist_ok=True))
    # This request needs write access, but uploads nothing.
    probe = CommitOperationAdd("README.md", b"---\n---\n")
    with_retries(lambda: hub.preupload_lfs_files(additions=[probe], revision=repo.revision, **repo.address))
