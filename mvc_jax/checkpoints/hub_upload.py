"""Uploads to the Hugging Face hub: a repository has all of its files, or none.

1. Everything that can be asked is asked before anything is written.
2. A new repository is private until every one of the upload is complete.
3. Large files are uploaded first, where nobody sees them. One commit then adds and
   deletes all files of a repository; it is refused if somebody else has committed since
   the repository was looked at.
4. If anything fails, what was created is deleted.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import huggingface_hub
from absl import logging
from etils import epath
from huggingface_hub import constants, errors
from huggingface_hub.hf_api import CommitOperationAdd, CommitOperationDelete

from mvc_jax.checkpoints import hub
from mvc_jax.errors import UserError

Kind = Literal["dataset", "model"]
_WRITERS = ("admin", "write", "contributor")  # roles in an organisation
_OF_THE_HUB = {".gitattributes"}  # which a new repository has
_FAILURES = (OSError, ValueError, RuntimeError)  # bases of the library's errors


@dataclasses.dataclass(frozen=True)
class Repository:
    """What is to be published in one place.

    Attributes:
      name: `owner/name`.
      kind: of the repository.
      content: path in the repository -> a local file, or what it holds.
    """

    name: str
    kind: Kind
    content: Mapping[str, epath.Path | bytes]

    @property
    def address(self) -> str:
        folder = "datasets/" if self.kind == "dataset" else ""
        return f"{constants.ENDPOINT}/{folder}{self.name}"

    @property
    def called(self) -> str:
        return f"{self.kind} {self.name}"


@dataclasses.dataclass(frozen=True)
class Found:
    """A repository that exists.

    Attributes:
      commit: the last one; None: it has none.
      files: that it has, without those of the hub itself.
      private: whether it is.
      ours: whether this program wrote it, by its card.
    """

    commit: str | None
    files: frozenset[str]
    private: bool
    ours: bool


def owners() -> list[str]:
    """The user of the token, and the organisations that it may write to.

    Raises:
      UserError: there is no token, the hub refuses it, or it cannot write; the hub does
        not answer, or the library is in offline mode.
    """
    if hub.offline():
        raise UserError(
            "HF_HUB_OFFLINE",
            wanted="a hub that can be reached",
            got="offline mode",
            fix="Unset it, or add --dry_run, which asks nothing.",
        )
    login = "Run `hf auth login` with a token that can write, or set HF_TOKEN."
    if not huggingface_hub.get_token():
        raise UserError(
            "the hub's token", wanted="one that can write", got="none", fix=login
        )
    try:
        account = _api().whoami()
    except _FAILURES as error:
        refused = _status(error) in (401, 403)
        raise UserError(
            "the hub's token" if refused else constants.ENDPOINT,
            wanted="one that it accepts" if refused else "an answer",
            got=_said(error),
            fix=login if refused else "Try again later.",
        ) from error
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            "the hub's token",
            wanted="one that can write",
            got=f"one of {account['name']} that can only read",
            fix=login,
        )
    others = account.get("orgs", ())
    roles = {each["name"]: each.get("roleInOrg", "write") for each in others}
    return [account["name"], *(name for name in roles if roles[name] in _WRITERS)]


def look(repository: Repository, *, update: bool, private: bool) -> Found | None:
    """What the hub has by this name; None: nothing.

    Args:
      repository: that will be published.
      update: whether the content of an existing one may be replaced.
      private: whether it is to be so; that of an existing one does not change.

    Raises:
      UserError: it cannot be published by this name; the hub does not answer.
    """
    try:
        info = _api().repo_info(repository.name, repo_type=repository.kind)
    except errors.RepositoryNotFoundError:
        return None
    except _FAILURES as error:
        raise _failed(repository, "looked at", error, "Try again later.") from error
    names = {file.rfilename for file in info.siblings or ()} - _OF_THE_HUB
    found = Found(
        info.sha, frozenset(names), bool(info.private), "mvc_jax" in (info.tags or ())
    )
    got, fix = "", "Choose another name."
    if names and not found.ours:
        got = f"one with other content ({', '.join(sorted(names)[:3])})"
    elif names and not update:
        got = "one that an earlier `mvc-jax push` filled"
        fix = "Choose another name, or add --update to replace its content."
    elif private and not found.private:
        got = "one that is public, with --private"
        fix = f"Make it private at {repository.address}/settings, or leave that out."
    if got:
        raise UserError(
            f"the {repository.called}",
            wanted="a name that is free",
            got=got,
            fix=fix,
        )
    return found


def publish(
    repositories: Sequence[Repository],
    found: Sequence[Found | None],
    *,
    message: str,
    private: bool,
) -> list[str]:
    """Publishes repositories, by the rules at the top of this file.

    Args:
      repositories: with their content.
      found: what `look` found for each.
      message: of the commits.
      private: whether new ones stay private.

    Returns:
      a sentence for each one.

    Raises:
      UserError: something failed; its last sentence says what there is now.
    """
    api = _api()
    created: list[Repository] = []
    step, at = "", repositories[0]
    committed: list[Repository] = []
    try:
        parents = []
        for at, there in zip(repositories, found, strict=True):
            step = "created"
            if there is None:
                api.create_repo(at.name, repo_type=at.kind, private=True)
                created.append(at)
                there = Found(_head(api, at), frozenset(), True, True)
            parents.append(there)
        additions = []
        for at in repositories:
            step = "filled"
            added = [
                CommitOperationAdd(path, x if isinstance(x, bytes) else str(x))
                for path, x in at.content.items()
            ]
            additions.append(added)
            api.preupload_lfs_files(
                at.name, added, repo_type=at.kind, free_memory=False
            )
        for at, there, added in zip(repositories, parents, additions, strict=True):
            step = "committed to"
            gone = [CommitOperationDelete(path) for path in there.files - {*at.content}]
            api.create_commit(
                at.name,
                [*added, *gone],
                commit_message=message,
                repo_type=at.kind,
                parent_commit=there.commit,
            )
            committed.append(at)
    except BaseException as error:
        left = _delete(api, created)
        kept = [x for x in committed if x not in created]
        said = _what_there_is(kept, left)
        if isinstance(error, _FAILURES):
            raise _failed(at, step, error, said) from error
        logging.warning("%s", said)
        raise
    return [
        _open(api, each, each in created and not private, private=there.private)
        for each, there in zip(repositories, parents, strict=True)
    ]


def _open(
    api: huggingface_hub.HfApi,
    repository: Repository,
    make_public: bool,
    *,
    private: bool,
) -> str:
    """Makes a complete repository public, if wanted; returns a sentence on it."""
    said = f"{repository.kind}: {repository.address}"
    if not make_public:
        return f"{said} (private: {repository.address}/settings)" if private else said
    try:
        api.update_repo_settings(
            repository.name, private=False, repo_type=repository.kind
        )
    except _FAILURES as error:
        return (
            f"{said} is complete, but still private ({_said(error)}); make it public "
            f"at {repository.address}/settings"
        )
    return said


def _delete(
    api: huggingface_hub.HfApi, created: Sequence[Repository]
) -> list[Repository]:
    """Deletes repositories; returns those that are still there."""
    left = []
    for each in created:
        try:
            api.delete_repo(each.name, repo_type=each.kind, missing_ok=True)
        except _FAILURES:
            left.append(each)
    return left


def _what_there_is(kept: Sequence[Repository], left: Sequence[Repository]) -> str:
    """What a push that failed has changed."""
    said = "Nothing was published"
    if kept:
        said = f"Only the {' and the '.join(x.called for x in kept)} was replaced"
    if not left:
        return f"{said}: run the same command again."
    names = " and the ".join(x.called for x in left)
    addresses = " and ".join(f"{x.address}/settings" for x in left)
    one = len(left) == 1
    return (
        f"{said}, but the private {names} {'is' if one else 'are'} left: delete "
        f"{'it' if one else 'them'} at {addresses}, or run the same command with "
        "--update, which fills what is left and leaves it private."
    )


def _head(api: huggingface_hub.HfApi, repository: Repository) -> str | None:
    return api.repo_info(repository.name, repo_type=repository.kind).sha


def _api() -> huggingface_hub.HfApi:
    return huggingface_hub.HfApi(endpoint=constants.ENDPOINT)


def _failed(
    repository: Repository, step: str, error: Exception, said: str
) -> UserError:
    status, fix = _status(error), said
    if status in (401, 403):
        fix = f"The token may not write there: see `hf auth whoami`. {said}"
    elif status in (409, 412):
        fix = f"Somebody else has changed it meanwhile. {said}"
    return UserError(
        f"the {repository.called}",
        wanted=f"one that can be {step}",
        got=_said(error),
        fix=fix,
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, or of what caused it."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code
    return None if error.__cause__ is None else _status(error.__cause__)


def _said(error: BaseException) -> str:
    """An error in one line."""
    status = _status(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = (lines or [""])[0].rstrip(".")
    said = f"{type(error).__name__}: {first}"
    return said if status is None or str(status) in first else f"{said} ({status})"
