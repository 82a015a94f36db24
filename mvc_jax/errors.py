"""The exception that a user of the tool reads, and checks that raise it."""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence


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
    """

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
        self.details = tuple(details)


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


def is_full_disk(error: BaseException | None) -> bool:
    """Whether ENOSPC is anywhere in the exception chain.

    Orbax and pyarrow report it in the message alone, without its errno.
    """
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC:
            return True
        if "No space left on device" in str(error) or "ENOSPC" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
