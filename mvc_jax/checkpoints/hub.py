"""Downloads of checkpoints from the Hugging Face hub.

Cache, token, mirror and offline mode are the library's, set by its environment
variables (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`).
"""

import functools
import re
import shlex
from collections.abc import Sequence

import huggingface_hub
from absl import logging
from etils import epath
from huggingface_hub import constants, errors, utils

from mvc_jax.errors import UserError, no_room

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_FOUND = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
_TIMEOUT = 10.0  # seconds
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack")


def is_local(name: str) -> bool:
    """Whether `name` is a path: it exists, or cannot be the name of a hub's model."""
    return not _NAME.fullmatch(name) or epath.Path(name).exists()


def offline() -> bool:
    """Whether the library is in offline mode and reads from its cache only."""
    return constants.HF_HUB_OFFLINE


def check_name(
    name: str, patterns: Sequence[str], *, field: str, revision: str = ""
) -> epath.Path | frozenset[str]:
    """Checks that `download` will find a model, with a small request and no download.

    So a mistyped name, a missing permission or a missing network is an error before the
    first stage runs. In offline mode, or where the hub does not answer, the model must
    be in the library's cache.

    Args:
      name: `organisation/model`, see `is_local`.
      patterns: `fnmatch` patterns of the files.
      field: config field that holds the name, for errors.
      revision: a branch, tag or commit; `""` for the default branch.

    Returns:
      the cached snapshot, if it has every such file that the hub has, or if the hub
      does not answer (then it may lack files); otherwise the names of the hub's files.

    Raises:
      UserError: there is no such model or revision, it is private or gated, or it is
        neither reachable nor cached.
    """
    wanted = list(patterns)
    try:
        listed = "HF_HUB_OFFLINE is set" if offline() else _list_files(name, revision)
        if isinstance(listed, str):
            cached = _cached(name, revision)
            if cached is None:
                reason = f"{listed}, and the local cache has no snapshot of it"
                raise errors.LocalEntryNotFoundError(reason)
            return cached
        commit, names, gated = listed
        cached = _cached(name, commit)
        selected = utils.filter_repo_objects(sorted(names), allow_patterns=wanted)
        if cached and all((cached / file).exists() for file in selected):
            return cached
        if gated:
            huggingface_hub.auth_check(name)
        return names
    except (OSError, ValueError) as error:  # base classes of the library's errors
        command = download_command(name, wanted, revision)
        raise _not_available(field, name, command, error) from error


def names(name: str, revision: str = "") -> frozenset[str]:
    """The names of a model's files; none where the hub does not tell them."""
    try:
        listed = "" if offline() else _list_files(name, revision)
    except (OSError, ValueError):  # base classes of the library's errors
        return frozenset()
    return frozenset() if isinstance(listed, str) else listed[1]


@functools.cache  # several stages check the same name
def _list_files(name: str, revision: str) -> tuple[str, frozenset[str], bool] | str:
    """The commit of a revision, its files, and whether they are gated.

    If the hub does not answer, the reason.

    Raises:
      RepositoryNotFoundError, RevisionNotFoundError, ValueError: there is none.
    """
    try:
        info = huggingface_hub.model_info(
            name, revision=revision or None, timeout=_TIMEOUT
        )
    except (*_NOT_FOUND, ValueError):  # ValueError: an impossible name
        raise
    except OSError as error:  # no network, or a failure of the hub
        reason = f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
        logging.info("%s: %s", name, reason)
        return reason
    names = frozenset(file.rfilename for file in info.siblings or ())
    return info.sha, names, bool(info.gated)


def _cached(name: str, revision: str) -> epath.Path | None:
    """The snapshot in the library's cache, maybe with some of its files; else None."""
    options = {"revision": revision} if revision else {}
    try:
        folder = huggingface_hub.snapshot_download(
            name, local_files_only=True, **options
        )
    except errors.LocalEntryNotFoundError:
        return None
    return epath.Path(folder)


def require_files(
    names: frozenset[str],
    groups: Sequence[Sequence[str]],
    *,
    field: str,
    fix: str = "Use another checkpoint.",
) -> None:
    """Checks the hub's list of a model's files.

    Args:
      names: of its files.
      groups: of each, one file suffices.
      field: config field with its value, for errors.
      fix: the error's `fix`.

    Raises:
      UserError: no file of a group is there.
    """
    for group in groups:
        if not names.intersection(group):
            pickles = sorted(name for name in names if name.endswith(PICKLES))
            raise UserError(
                field,
                wanted=f"{' or '.join(group)} among its files on the hub",
                got=", ".join(pickles[:3]) or ", ".join(sorted(names)[:3]) or "none",
                fix=f"{'Pickles are never opened. ' if pickles else ''}{fix}",
            )


def download_command(name: str, patterns: Sequence[str], revision: str = "") -> str:
    """The command line that downloads the files into the library's cache.

    Patterns of small files in folders are shortened: they then select others as well.
    """
    words = ["hf", "download", name]
    words += ["--revision", revision] if revision else []
    short = dict.fromkeys(map(_shortened, patterns))
    return shlex.join([*words, "--include", *short])


def _shortened(pattern: str) -> str:
    suffix = pattern[pattern.rfind(".") :]
    return f"*/*{suffix}" if "/" in pattern and suffix in (".json", ".txt") else pattern


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
        if no_room(error, constants.HF_HUB_CACHE):
            error.filename = getattr(error, "filename", None) or constants.HF_HUB_CACHE
            raise
        command = download_command(name, patterns, revision)
        raise _not_available(field, name, command, error) from error
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


def _not_available(field: str, name: str, command: str, error: Exception) -> UserError:
    first_line = next(iter(str(error).splitlines()), "")
    fix = f"With a network, and without HF_HUB_OFFLINE, run: {command}"
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{name}"
        fix = f"Accept its terms at {page}, run `hf auth login`, then: {command}"
    elif isinstance(error, errors.RevisionNotFoundError):
        fix = f"Correct the revision; it is right when this finds it: {command}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        fix = (
            "Correct the name. If it is right the model is private: run `hf auth "
            f"login`, then: {command}"
        )
    return UserError(
        field,
        wanted="a checkpoint folder, or a name on the Hugging Face hub",
        got=f"no such folder, and from the hub {type(error).__name__}: {first_line}",
        fix=fix,
    )
