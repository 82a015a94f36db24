"""The exception that a user of the tool reads, and checks that raise it."""

import errno
import os
import resource
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence

_NO_ROOM = {  # what it is, and how to make room
    errno.ENOSPC: ("a full disk", "Free some of it"),
    errno.EDQUOT: ("an exhausted disk quota", "Free some of it, or have it raised"),
    errno.EFBIG: ("a limit on the size of files", "Raise it (`ulimit -f`)"),
    errno.EROFS: ("a disk that is mounted read-only", "Mount it for writing"),
}


class UserError(Exception):
    """Something the user controls is wrong: a field, a file, a machine.

    Rooms and stages raise it; `train.main` prints it as one sentence and exits with
    code 2. A traceback is shown for bugs only.

    Args:
      name: the field (`config.data.per_class`) or path that is wrong.
      wanted: what would have been valid.
      got: what was found instead.
      fix: what the user can do, as an imperative sentence.
      details: lines to print below the message, e.g. one for each bad image.

    `shared` says that all processes of the run raise it, so that one prints it.
    """

    shared = False

    def __init__(
        self,
        name: str,
        *,
        wanted: str,
        got: str,
        fix: str,
        details: Sequence[str] = (),
    ):
        super().__init__(f"{name}: wanted {wanted}, got {got}. {fix}")
        self.name = name
        self.wanted, self.got, self.fix = wanted, got, fix
        self.details = tuple(details)

    def fields(self) -> dict:
        """The arguments, of which `UserError(**fields)` makes the same error."""
        names = ("name", "wanted", "got", "fix", "details")
        return {name: getattr(self, name) for name in names}


def shell_word(text: str) -> str:
    """A word of a command as it is typed: in one line, whatever breaks it has."""
    if " ".join(text.split()) == text:
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace(" ", "\\x20")
    for character, name in zip("\n\t\r\v\f", "ntrvf", strict=True):
        escaped = escaped.replace(character, f"\\{name}")
    return f"$'{escaped}'"


def require_at_most(prefix: str, fields: Mapping, name: str, limit: str) -> None:
    """Raises a `UserError` if one field is above another one.

    Args:
      prefix: of the field names, e.g. `"config.finetune"`.
      fields: name -> value.
      name: of the field that may be as large as the other.
      limit: of the other field.
    """
    if fields[name] > fields[limit]:
        raise UserError(
            f"{prefix}.{name}",
            wanted=f"at most {prefix}.{limit}={fields[limit]}",
            got=f"{fields[name]}",
            fix=f"Lower it, or raise {prefix}.{limit}.",
        )


def require_one_of(
    prefix: str, fields: Mapping, choices: Mapping[str, Sequence[str]]
) -> None:
    """Raises a `UserError` for the first field whose value is not among its choices.

    Args:
      prefix: of the field names, e.g. `"config.finetune"`.
      fields: name -> value.
      choices: name -> allowed values.
    """
    for name, allowed in choices.items():
        if fields[name] not in allowed:
            raise UserError(
                f"{prefix}.{name}",
                wanted=" or ".join(allowed),
                got=repr(fields[name]),
                fix="Choose one of these.",
            )


def require_disk_space(folder: os.PathLike, size: int, *, what: str, fix: str) -> None:
    """Raises a `UserError` unless the disk of a local `folder` has `size` bytes free.

    Args:
      folder: an existing folder; one on a remote file system always passes.
      size: bytes to be written; a tenth more is required, for names and indices.
      what: what is to be written, for the message.
      fix: the error's `fix`.
    """
    if "://" in str(folder):
        return
    free = shutil.disk_usage(str(folder)).free
    if free <= 1.1 * size:
        raise UserError(
            str(folder),
            wanted=f"{size} bytes of free disk for {what}",
            got=f"{free}",
            fix=fix,
        )


def no_room(
    error: BaseException, folder: os.PathLike | str, size: int = 0
) -> UserError | None:
    """The error to show for one that was caused by a disk that takes no more bytes.

    Args:
      error: any, also one of Orbax or pyarrow, which have the reason in the text alone,
        as the cause of another or in a group.
      folder: that was written to; used where `error` does not name a file.
      size: bytes that were to be written; 0: unknown.

    Returns:
      None if it has another cause.
    """
    for part in _chain(error):
        for code, (what, fix) in _NO_ROOM.items():
            texts = (os.strerror(code), errno.errorcode[code])
            same = getattr(part, "errno", None) == code
            if not same and not any(text in str(part) for text in texts):
                continue
            path = getattr(part, "filename", None)
            free = f"{_free(path or folder)} bytes free"
            if path is None and not size:
                temporary = tempfile.gettempdir()
                free += f", {_free(temporary)} in {temporary}"
            if code == errno.EFBIG:
                free = f"{resource.getrlimit(resource.RLIMIT_FSIZE)[0]} bytes"
            return UserError(
                str(path or folder),
                wanted=f"{size} bytes of free disk" if size else "space to write",
                got=f"{what} ({free})",
                fix=f"{fix}, then rerun the same command to resume.",
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the members of a group, and what each of them was raised from."""
    while error is not None:
        yield error
        for member in getattr(error, "exceptions", ()):
            yield from _chain(member)
        error = error.__cause__ or error.__context__


def _free(path: os.PathLike | str) -> int:
    """Free bytes of the disk on which `path` is, or would be; 0: unknown."""
    path = os.path.abspath(path)
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0
