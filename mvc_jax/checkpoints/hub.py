"""Downloads of checkpoints from the Hugging Face hub.

Cache, token, mirror and offline mode are the library's, set by its environment
variables (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`).
"""

import errno
import functools
import re
from collections.abc import Sequence

import huggingface_hub
from absl import logging
from etils import epath
from huggingface_hub import constants, errors

from mvc_jax.errors import UserError

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_FOUND = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
_TIMEOUT = 10.0  # seconds


def is_local(name: str) -> bool:
    """Whether `name` is a path: it exists, or cannot be the name of a hub's model."""
    return not _NAME.fullmatch(name) or epath.Path(name).exists()


def offline() -> bool:
    """Whether the library is in offline mode and reads from its cache only."""
    return constants.HF_HUB_OFFLINE


@functools.cache  # several stages check the same name
def check_name(name: str, *, field: str, revision: str = "") -> None:
    """Checks that the hub has a model and revision.

    This takes one small request, so that a mistyped name is an error before the first
    stage runs. Without a network, or in offline mode, nothing is checked: `download`
    will raise.

    Args:
      name: of a model on the hub; a path (see `is_local`) is not checked.
      field: config field that holds the name, for errors.
      revision: a branch, tag or commit; `""` for the default branch.

    Raises:
      UserError: the hub has no such model, or no such revision of it.
    """
    if is_local(name) or offline():
        return
    try:
        huggingface_hub.model_info(name, revision=revision or None, timeout=_TIMEOUT)
    except (*_NOT_FOUND, ValueError) as error:  # ValueError: an impossible name
        raise _not_available(field, error) from error
    except OSError as error:  # no network, or a failure of the hub
        reason = type(error).__name__
        logging.info("the Hugging Face hub cannot be reached for %s (%s)", name, reason)


def locate(
    name: str, patterns: Sequence[str], *, field: str, revision: str = ""
) -> epath.Path:
    """The folder of a checkpoint: `download`s a hub name, returns a path unchecked."""
    if is_local(name):
        return epath.Path(name).expanduser()
    return download(name, patterns, field=field, revision=revision)


def download(
    name: str, patterns: Sequence[str], *, field: str, revision: str = ""
) -> epath.Path:
    """The folder of a snapshot; missing files are downloaded first.

    Without a network, or in offline mode, it is the cached one, which may lack files:
    the caller checks for those that it needs.

    Args:
      name: `organisation/model`.
      patterns: `fnmatch` patterns of the files.
      field: config field that holds the name, for errors.
      revision: a branch, tag or commit; `""` for the default branch.

    Raises:
      UserError: the download failed.
    """
    options = {"revision": revision} if revision else {}
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=list(patterns), **options
        )
    except (OSError, ValueError) as error:  # base classes of the library's errors
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise _not_available(field, error) from error
    return epath.Path(folder)


def cached(name: str, patterns: Sequence[str], revision: str = "") -> epath.Path | None:
    """The folder of a snapshot in the library's cache, None if there is none.

    It may lack files; nothing is downloaded.
    """
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=list(patterns),
            revision=revision or None,
            local_files_only=True,
        )
    except (OSError, ValueError):  # base classes of the library's errors
        return None
    return epath.Path(folder)


def commit_of(folder: epath.PathLike) -> str | None:
    """The commit of a snapshot in the hub's cache; None for other folders."""
    folder = epath.Path(folder)
    cached = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if cached else None


def _not_available(field: str, error: Exception) -> UserError:
    first_line = next(iter(str(error).splitlines()), "")
    return UserError(
        field,
        wanted="a checkpoint folder, or a name on the Hugging Face hub",
        got=f"no such folder, and from the hub {type(error).__name__}: {first_line}",
        fix="Check the name. A gated or private model needs `hf auth login`; without a "
        "network, download it elsewhere and use its folder.",
    )
