"""Where a folder is pushed: named, checked, and there before the work begins."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.hub.requests import api, one_line_hub_errors, require_token, status_of, with_retries


@dataclass
class HubArguments:
    """What a stage accepts that pushes and does not train; `TrainingArguments` has the same."""

    push_to_hub: bool = field(default=False, metadata={"help": "Push the folder to the Hub at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repo to push to, as owner/name."})
    hub_private_repo: bool | None = field(
        default=True,
        metadata={"help": "A new repo on the Hub is private, and a public one is refused; false: a public one."},
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to. Unset: main."})
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Token. Unset: HF_TOKEN, or that of `hf auth login`."}
    )


class Repo(NamedTuple):
    """Where to push, and as whom. private: what a new repo becomes; a public one is then refused."""

    name: str
    kind: str = "model"  # or dataset
    private: bool | None = True
    revision: str | None = None
    token: str | None = None

    @classmethod
    def asked(cls, arguments: Any, kind: str = "model") -> "Repo":
        """Of anything with the fields of `HubArguments`."""
        private, revision = arguments.hub_private_repo, arguments.hub_revision
        return cls(arguments.hub_model_id or "", kind, private, revision, arguments.hub_token)

    @property
    def address(self) -> dict[str, str]:
        return {"repo_id": self.name, "repo_type": self.kind}


def check_push(arguments: Any) -> None:
    """Refuse a push that cannot succeed, before anything is loaded; asks nobody. It looks at nothing where none is asked.

    Raises:
        UserError: no repo or a malformed one, no token, offline; or a repo is named, but no push is asked for.
    """
    if arguments.push_to_hub:
        check_repo(Repo.asked(arguments))
    elif arguments.hub_model_id is not None:
        raise UserError(
            f"hub_model_id is {arguments.hub_model_id}, but nothing is pushed without push_to_hub; pass --push_to_hub "
            "true, or leave out hub_model_id"
        )


def check_repo(repo: Repo) -> None:
    """Raises UserError: the name is not one that the Hub takes, there is no token, or the Hub is switched off."""
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not repo.name:
        raise UserError("no repo to push to; pass --hub_model_id owner/name")
    try:
        validate_repo_id(repo.name)
    except HFValidationError as error:
        raise UserError(f"hub_model_id {repo.name} names no repo ({error}); give it as owner/name") from None
    if "/" not in repo.name:
        raise UserError(f"hub_model_id {repo.name} does not say whose it is; give it as owner/name")
    if constants.HF_HUB_OFFLINE:
        raise UserError("nothing can be pushed while HF_HUB_OFFLINE=1; unset it, or leave out --push_to_hub")
    require_token(repo.token)


def open_repo(repo: Repo) -> None:
    """Make sure, before hours of work, that the repo is there and may be written to; make it if it is not there.

    Raises:
        UserError: it may not, or it is public where a private one is asked for.
    """
    with one_line_hub_errors(f"{repo.name} cannot be pushed to", "", repo.token):
        ensure_repo(repo)


def ensure_repo(repo: Repo) -> None:
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
            f"{repo.name} is public on the Hub, and a private repo is asked for; pass --hub_private_repo false to push "
            "there, or give another --hub_model_id"
        )
    if repo.revision not in (None, "main"):
        with_retries(lambda: hub.create_branch(**repo.address, branch=str(repo.revision), exist_ok=True))
    # Whoever asks how a card would have to be sent must be allowed to write. Nothing is sent.
    probe = CommitOperationAdd("README.md", b"---\n---\n")
    with_retries(lambda: hub.preupload_lfs_files(additions=[probe], revision=repo.revision, **repo.address))
