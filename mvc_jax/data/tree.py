"""What is known of a folder of images before one is decoded."""

import collections
import dataclasses
import io
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from mvc_jax import servers
from mvc_jax.data import layout, remote
from mvc_jax.data.layout import class_key
from mvc_jax.errors import UserError

_Result = TypeVar("_Result")


@dataclasses.dataclass
class Tree:
    """The contents of a folder, as paths relative to it, and what is known of them.

    Attributes:
      name: of the folder, as the user wrote it.
      images: files with the suffix of an image.
      others: all other files.
      folders: all folders.
      junk: number of files and folders that operating systems leave behind.
      defects: path -> the reason why it is not used.
      remarks: folder -> why it is ignored on purpose.
      labels: image -> (class, split), where the split is train, val or test.
      rows: image -> its row in a table.
      classes: all that occur, including those whose images are all defects.
      class_folders: class -> names, as on disk, of the folders of its training images.
      entries: file -> what a server says of it; of a remote folder.
    """

    name: str
    images: list[str] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)
    folders: list[str] = dataclasses.field(default_factory=list)
    junk: int = 0
    defects: dict[str, str] = dataclasses.field(default_factory=dict)
    remarks: dict[str, str] = dataclasses.field(default_factory=dict)
    labels: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    rows: dict[str, dict] = dataclasses.field(default_factory=dict)
    classes: set[str] = dataclasses.field(default_factory=set)
    class_folders: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.remote = None
        self.path = os.path.expanduser(self.name)
        if remote.is_remote(self.name):
            self.remote = remote.Remote(self.name)
            self.path = self.remote.path

    def open(self, path: str) -> Any:
        """Opens a file for reading, by its path in the tree; a remote one is read."""
        if self.remote is None:
            return open(os.path.join(self.path, path), "rb")
        return io.BytesIO(self.remote.read(self.entries[path]["name"]))

    def map(
        self, function: Callable[[str], _Result], paths: Iterable[str]
    ) -> list[_Result]:
        """The results for paths, in their order; remote ones are read side by side."""
        if self.remote is None:
            return list(map(function, paths))
        return servers.parallel(function, paths)

    def error(self, *, wanted: str, got: str, fix: str) -> UserError:
        """An error that lists the defects."""
        details = [f"{path}: {reason}" for path, reason in sorted(self.defects.items())]
        name = f"config.data.source=folder:{self.name}"
        return UserError(name, wanted=wanted, got=got, fix=fix, details=details)

    def ambiguous(self, why: layout.Ambiguous) -> UserError:
        """An error that shows the tree and the fields that settle what it means."""
        fix = " Or: ".join(f"{fix}." for fix in why.fixes)
        error = self.error(
            wanted="folders of classes, or parts with class folders, that can be told "
            "apart",
            got=str(why),
            fix=f"Settle it: {fix}",
        )
        error.details = (*layout.lines(self.images, self.others), *error.details)
        return error

    def folders_of_classes(self) -> dict[str, str]:
        """Class -> the folder that holds its training images, or its name.

        It is its name where it has none, or several, or shares it with another class.
        """
        shared = collections.Counter(x for y in self.class_folders.values() for x in y)
        found = {}
        for class_ in self.classes:
            mine = self.class_folders.get(class_, ())
            (folder,) = mine if len(mine) == 1 else (class_,)
            found[class_] = folder if shared[folder] <= 1 else class_
        return found

    def class_of(self, name: str, known: set[str]) -> str:
        """The class among `known` that a name means, or the name itself.

        Raises:
          UserError: it means two of them.
        """
        if name in known:
            return name
        key = class_key(name)
        same = sorted(other for other in known if class_key(other) == key)
        if len(same) > 1:
            raise self.ambiguous(
                layout.Ambiguous(
                    f"{name!r}, which may be either of the classes {same[0]!r} and "
                    f"{same[1]!r}",
                    "rename one of these",
                )
            )
        return same[0] if same else name
