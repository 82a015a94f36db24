"""The one exception that a user of the tool is meant to read."""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence


class UserError(Exception):
    """Something in the user's hands is wrong: a field, a file, a machine.

    Rooms and stages raise it; `train.main` prints it as one sentence and exits with
    code 2. A traceback is for our own mistakes only.

    Args:
      name: the field (`config.data.per_class`) or path that is wrong.
      wanted: what would have been right.
      got: what was found instead.
      fix: the way out, as an imperative sentence.
      details: lines to print below it, e.g. one for each bad image.
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


def require(condition: bool, name: str, *, wanted: str, got: object, fix: str) -> None:
    """Raises a `UserError` unless `condition` holds."""
    if not condition:
        raise UserError(name, wanted=wanted, got=f"{got}", fix=fix)


def require_within(prefix: str, fields: Mapping, ranges: Mapping[str, tuple]) -> None:
    """Raises a `UserError` for the first field outside its range.

    Args:
      prefix: of the names, e.g. `"config.finetune"`.
      fields: name -> value.
      ranges: name -> (least, most, what to say as the way out).
    """
    for name, (least, most, fix) in ranges.items():
        require(
            least <= fields[name] <= most,
            f"{prefix}.{name}",
            wanted=f"a number from {least:g} to {most:g}",
            got=fields[name],
            fix=fix,
        )


def require_one_of(
    prefix: str, fields: Mapping, choices: Mapping[str, Sequence[str]]
) -> None:
    """Raises a `UserError` for the first field that is none of its choices."""
    for name, known in choices.items():
        require(
            fields[name] in known,
            f"{prefix}.{name}",
            wanted=" or ".join(known),
            got=repr(fields[name]),
            fix="Name one of these.",
        )


def require_disk_space(folder: os.PathLike, size: int, *, what: str, fix: str) -> None:
    """Raises a `UserError` unless a local disk has room for `size` bytes."""
    if "://" in str(folder):
        return
    free = shutil.disk_usage(str(folder)).free
    require(
        free > 1.1 * size,  # and a little for names and indices
        str(folder),
        wanted=f"{size} bytes of free disk for {what}",
        got=free,
        fix=fix,
    )


def is_full_disk(error: BaseException | None) -> bool:
    """Whether ENOSPC is anywhere in the chain; Orbax and pyarrow wrap it in words."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC:
            return True
        if "No space left on device" in str(error) or "ENOSPC" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
