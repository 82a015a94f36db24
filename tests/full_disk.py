"""The program on a disk that refuses one file, as a full one does."""

import errno
import os
from collections.abc import Sequence

from mvc_jax import files, train


def main(refused: str, code: str, arguments: Sequence[str]) -> int:
    """Runs `train` with these arguments.

    Args:
      refused: the path of the file.
      code: name of the error that its writing raises, e.g. "ENOSPC".
      arguments: of `train`, after the program's name.
    """
    replacing, number = files.replacing, getattr(errno, code)

    def full(path):
        if str(path) == refused:
            raise OSError(number, os.strerror(number), refused)
        return replacing(path)

    files.replacing = full
    return train.main(["train", *arguments])
