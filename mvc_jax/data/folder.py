"""A folder of images as a source: its layout is found out, and nothing is decoded.

`<class>` is a folder that has the name of a class; folders inside belong to it.

1. `train/<class>/*` and `test/<class>/*`. Parts may also be called `training`,
   `testing`, `val`, `valid` and `validation`, in any case. `test` is the test part and
   `val` joins train; without labelled images in `test`, `val` is the test part. One
   that shares no class with train has no labels. Without both there is no split.
2. `<class>/*`: no split.
3. Tiny ImageNet: `train/<wnid>/images/*`, and `val/images/*` with the labels of
   `val/val_annotations.txt`.
4. Hugging Face's `metadata.csv` or `metadata.jsonl`, in the root or in the folder of a
   part. A row names an image, counted from there, in one of `FILE_COLUMNS`, and its
   class in the first of `LABEL_COLUMNS` that there is; a number is a name, too. In the
   root, the part is in the column `split`, else it is the folder that the image lies
   in. Rows win over the names of folders. `generate` writes this layout.

`words.txt` in the root, lines like `n01443537<TAB>goldfish, Carassius auratus`, gives
wnids their first name, or all of them where two classes have the same first.

Hidden files, the litter of operating systems and, outside of class folders, files with
other suffixes are ignored. Of all else that is not used, `defects` says why.
"""

import collections
import csv
import functools
import json
import os
import posixpath
import re
import shlex
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from mvc_jax.data.captions import readable
from mvc_jax.data.decode import SUFFIXES, BadImage, Decoder
from mvc_jax.data.example import Example
from mvc_jax.errors import UserError

FILE_COLUMNS = ("file_name", "filename")
# Names before `label`, which is a number where there are both.
LABEL_COLUMNS = ("label_name", "class_name", "category_name")
LABEL_COLUMNS += ("label", "class", "category", "target")
_PARTS = dict.fromkeys(("train", "training"), "train")
_PARTS |= dict.fromkeys(("test", "testing"), "test")
_PARTS |= dict.fromkeys(("val", "valid", "validation"), "val")
_LITTER = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
_ARCHIVE = re.compile(r"\.(zip|7z|rar|tgz|tar(\.\w+)?)$", re.IGNORECASE)
_UNPACK = {"zip": "unzip {0} -d {1}", "7z": "7z x {0} -o{1}", "rar": "unrar x {0} {1}/"}
_NOT_AN_IMAGE = "not a PNG, JPEG, WebP, TIFF or BMP name"
_nfc = functools.partial(unicodedata.normalize, "NFC")  # macOS makes two letters of é


class Folder:
    """Images in a folder as a `Source`; an id is the path from the root.

    Args:
      root: of the folder; `~` is the user's home.
      decoder: of the images.

    Raises:
      UserError: no images to train on, or metadata that cannot be read.
    """

    def __init__(self, root: str, decoder: Decoder):
        tree = _Tree(root)
        _walk(tree)
        _find_labels(tree)
        _explain_the_rest(tree)
        _check_labels(tree)
        names = _class_names(tree)
        index = {key: label for label, key in enumerate(names)}
        self._root, self._decoder = tree.path, decoder
        self.class_names = tuple(names.values())
        self.ids = tuple(sorted(tree.labels))
        labels, parts = zip(*(tree.labels[i] for i in self.ids), strict=True)
        self.labels = np.asarray([index[key] for key in labels], np.int32)
        test = next((part for part in ("test", "val") if part in parts), None)
        self.is_test = np.asarray([part == test for part in parts]) if test else None
        self.defects = dict(sorted(tree.defects.items()))
        self.remarks = tuple(f"{top}: {said}" for top, said in tree.remarks.items())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        id_ = self.ids[index]
        try:
            with open(os.path.join(self._root, id_), "rb") as file:
                content = file.read()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        image, note = self._decoder(content)
        return Example(image=image, label=int(self.labels[index]), id=id_, note=note)


class _Tree:
    """What lies in a folder, by its path from there, and what is known of it.

    `labels` is image -> (class, part); a part is a value of `_PARTS`. `classes` has all
    that were seen, also those whose images are defects.
    """

    def __init__(self, name: str):
        self.name, self.path = name, os.path.expanduser(name)
        self.images: list[str] = []
        self.others: list[str] = []
        self.folders: list[str] = []
        self.defects, self.remarks = {}, {}
        self.labels: dict[str, tuple[str, str]] = {}
        self.classes: set[str] = set()

    def error(self, *, wanted: str, got: str, fix: str) -> UserError:
        details = [f"{path}: {reason}" for path, reason in sorted(self.defects.items())]
        name = f"config.data.source=folder:{self.name}"
        return UserError(name, wanted=wanted, got=got, fix=fix, details=details)


def _walk(tree: _Tree) -> None:
    """Lists everything, links followed; one look at each file, none into it."""
    pending: list[tuple[str, tuple]] = [("", ())]
    while pending:
        folder, above = pending.pop()
        path = os.path.join(tree.path, folder)
        try:
            here = os.path.join(os.path.realpath(path), "")  # ends with a slash
            if os.path.islink(path) and any(real.startswith(here) for real in above):
                tree.defects[folder] = "a link to a folder that it lies in"
                continue
            with os.scandir(path) as entries:
                inside = _sort_in(tree, folder and folder + "/", entries)
        except OSError as error:
            tree.defects[folder or "."] = f"cannot be read: {error.strerror}"
            continue
        tree.folders += inside
        pending += [(name, (*above, here)) for name in inside]
    for names in (tree.images, tree.others, tree.folders):
        names.sort()  # the file system has an order of its own


def _sort_in(tree: _Tree, prefix: str, entries: Iterable[os.DirEntry]) -> list[str]:
    """Sorts the files of a folder in; returns the folders in it."""
    folders = []
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in _LITTER:
            continue
        path = prefix + entry.name
        is_image = entry.name.lower().endswith(SUFFIXES)
        if reason := _defect(entry, is_image):
            tree.defects[_printable(path)] = reason
        elif entry.is_dir():
            folders.append(path)
        else:
            (tree.images if is_image else tree.others).append(path)
    return folders


def _defect(entry: os.DirEntry, is_image: bool) -> str:
    """What is seen to be wrong with a file or folder, "" if nothing."""
    try:
        entry.name.encode()
        if entry.is_dir():
            return "a folder, not an image" if is_image else ""
        if not is_image and entry.is_file():
            return ""
        status = entry.stat()
    except UnicodeEncodeError:
        return "a name that is not UTF-8"
    except OSError as error:
        broken = entry.is_symlink() and not isinstance(error, PermissionError)
        return "a broken link" if broken else f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"  # a pipe would keep its reader waiting for ever
    if not status.st_size:
        return "empty file"
    return "" if os.access(entry.path, os.R_OK) else "cannot be read: Permission denied"


def _find_labels(tree: _Tree) -> None:
    """Finds out which layout this is, and labels the images by it."""
    tops = {folder for folder in tree.folders if "/" not in folder}
    parts = {top: _PARTS[top.lower()] for top in tops if top.lower() in _PARTS}
    # A class may be called `test`; where all folders are parts, it is none.
    is_split = "train" in parts.values() or len(parts) == len(tops)
    if _table(tree, "") or not is_split:
        parts = {"": "train"}
    # Train first: its classes tell whether the folders of the others are any.
    for top in sorted(parts, key=lambda top: (parts[top] != "train", top)):
        prefix = top and top + "/"
        if found := _table(tree, prefix):
            _label_by_table(tree, *found)
        else:
            _label_by_folder(tree, prefix, parts[top])


def _label_by_folder(tree: _Tree, prefix: str, part: str) -> None:
    """Labels images below `prefix` by the first folder on their way."""

    def folder(path: str) -> str:
        name, slash, _ = path[len(prefix) :].partition("/")
        return name if slash and path.startswith(prefix) else ""

    bad = [path for path in tree.defects if path.lower().endswith(SUFFIXES)]
    keys = {name: _nfc(name) for name in map(folder, [*tree.images, *bad]) if name}
    if part != "train" and tree.classes and tree.classes.isdisjoint(keys.values()):
        return
    tree.classes.update(keys.values())
    for path in tree.images:
        if name := folder(path):
            tree.labels[path] = (keys[name], part)
    for path in tree.others:
        name = folder(path)
        if name in keys and not path.endswith(f"/{name}_boxes.txt"):  # Tiny ImageNet's
            tree.defects[path] = _NOT_AN_IMAGE
    for path in set(tree.folders) - tree.defects.keys():
        name = path[len(prefix) :]
        if path.startswith(prefix) and "/" not in name and name not in keys:
            tree.defects[path + "/"] = "a folder without images"


def _table(tree: _Tree, prefix: str) -> tuple[str, str] | None:
    """(the file of labels in a folder, where the names in it begin), if any."""
    names = (prefix + "metadata.csv", prefix + "metadata.jsonl")
    found = [name for name in names if name in tree.others]
    if len(found) == 2:
        got = " and ".join(found)
        raise tree.error(wanted="one metadata file", got=got, fix="Delete one of them.")
    if found:
        return found[0], prefix
    boxes, images = prefix + "val_annotations.txt", prefix + "images/"
    # Some sort val/ into class folders and leave the file behind.
    in_use = boxes in tree.others and any(p.startswith(images) for p in tree.images)
    return (boxes, images) if in_use else None


def _label_by_table(tree: _Tree, table: str, prefix: str) -> None:
    """Labels images below `prefix` by the rows of a file."""
    rows = _parse(tree, table, _PARSERS[os.path.splitext(table)[1]])
    columns = {key.strip().lower(): key for row in rows for key in row}
    file_column = _column(tree, table, columns, FILE_COLUMNS)
    label_column = _column(tree, table, columns, LABEL_COLUMNS)
    split_column = None if prefix else columns.get("split")
    here, others = os.path.basename(table), set(tree.others)
    below = [*tree.defects, *tree.others, *tree.images]
    on_disk = {_nfc(p[len(prefix) :]): p for p in below if p.startswith(prefix)}
    for number, row in enumerate(rows, start=1):
        name, label = _text(row.get(file_column)), _text(row.get(label_column))
        inside = posixpath.normpath(name.replace("\\", "/"))
        path = on_disk.get(inside, prefix + inside)
        split = _text(row.get(split_column)) if split_column else path.split("/")[0]
        # Without a column, an image in no folder of a part is one to train on.
        told = (label, _PARTS.get(split.lower(), "" if split_column else "train"))
        tree.classes |= {label} - {""}
        if not name:
            path, reason = f"{table}, row {number}", "no file name"
        elif path in tree.defects:
            continue
        elif inside.startswith(("/", "../")) or inside == "..":
            reason = f"listed in {here}, outside of its folder"
        elif inside not in on_disk:
            reason = f"listed in {here}, no such file"
        elif path in others:
            reason = _NOT_AN_IMAGE
        elif not label:
            reason = f"no label: {here} gives none"
        elif not told[1]:
            reason = f"split {split!r} in {here} is neither train, val nor test"
        elif (first := tree.labels.setdefault(path, told)) != told:
            del tree.labels[path]
            reason = f"listed in {here} as {first} and as {told}"
        else:
            continue
        tree.defects[path] = reason


def _parse(tree: _Tree, path: str, parser: Callable) -> list[dict[str, Any]]:
    """The rows of a text file; what is wrong in it is an error with its line."""
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        with open(os.path.join(tree.path, path), "rb") as file:
            for line in file:
                number += 1
                yield line.decode("utf-8-sig")

    try:
        return list(parser(lines()))
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise tree.error(
            wanted=f"{path} well-formed and in UTF-8",
            got=f"in line {number}: {error}",
            fix="Mend that line.",
        ) from error


def _csv(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for row in csv.DictReader(lines, strict=True, skipinitialspace=True):
        if None in row:
            raise ValueError("more fields than columns")
        yield row


def _jsonl(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in filter(str.strip, lines):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        yield row


def _tabs(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Tiny ImageNet's files of labels and of words: file or wnid, wnid or names, ..."""
    for line in filter(str.strip, lines):
        first, second, *_ = (*line.split("\t"), "")
        yield {"file_name": first, "label": second}


_PARSERS = {".csv": _csv, ".jsonl": _jsonl, ".txt": _tabs}


def _column(tree: _Tree, table: str, columns: dict[str, str], names: tuple) -> str:
    for name in names:
        if name in columns:
            return columns[name]
    raise tree.error(
        wanted=f"a column {' or '.join(names)} in {table}",
        got=f"the columns {', '.join(columns.values()) or '(no rows)'}",
        fix="Name one of them so.",
    )


def _explain_the_rest(tree: _Tree) -> None:
    """Why images have no label; said once of a folder that has none with a label."""
    used = {path.split("/")[0] for path in tree.labels}
    unused = collections.Counter()
    for path in set(tree.images) - tree.labels.keys() - tree.defects.keys():
        top, slash, _ = path.partition("/")
        if slash and top not in used:
            unused[top + "/"] += 1
        else:
            tree.defects[path] = "no label: in no class folder, in no row of metadata"
    for top, count in unused.items():
        said = tree.remarks if top[:-1].lower() in _PARTS else tree.defects
        said[top] = f"{count} images without labels are not used"


def _check_labels(tree: _Tree) -> None:
    if any(part == "train" for _, part in tree.labels.values()):
        return
    kinds = collections.Counter(os.path.splitext(p)[1].lower() for p in tree.others)
    found = [f"{n} {kind or 'other'} files" for kind, n in kinds.most_common(4)]
    found = [f"{len(tree.images)} images", *found, f"{len(tree.folders)} folders"]
    got = ", ".join([*found, f"{len(tree.defects)} defects"])
    files = [os.path.join(tree.path, path) for path in tree.others]
    if "." in tree.defects:
        got, files = f"a path that {tree.defects['.']}", [tree.path]
    fix = "The layouts that are read are in mvc_jax/data/folder.py."
    archive = next(filter(_ARCHIVE.search, files), None)
    if archive and not tree.images:
        kind = _ARCHIVE.search(archive)[1].lower()
        command = _UNPACK.get(kind, "mkdir -p {1} && tar -xf {0} -C {1}")
        paths = (archive, _ARCHIVE.sub("", tree.path))
        fix = f"Unpack it: {command.format(*map(shlex.quote, paths))}"
    wanted = "labelled images to train on, in train/<class>/, <class>/ or metadata"
    raise tree.error(wanted=wanted, got=got, fix=fix)


def _class_names(tree: _Tree) -> dict[str, str]:
    """Class -> its name, in the order of labels; no two read the same in a prompt."""
    words = _parse(tree, "words.txt", _tabs) if "words.txt" in tree.others else []
    glosses = {row["file_name"]: _text(row["label"]) for row in words}
    forms = {key: (key, key, key) for key in sorted(tree.classes)}
    for key in forms:
        if re.fullmatch(r"n\d{8}", key) and (gloss := glosses.get(key)):
            first = gloss.split(",")[0]
            forms[key] = (first, gloss, f"{first} ({key})")
    names = {key: form[0] for key, form in forms.items()}
    for longer in (1, 2):
        count = collections.Counter(map(readable, names.values()))
        for key, name in names.items():
            if count[readable(name)] > 1:
                names[key] = forms[key][longer]
    return names


def _text(value: Any) -> str:
    """A cell as text, "" if it is neither that nor a number."""
    known = isinstance(value, str | int | float)
    return _nfc(_printable(str(value)).strip()) if known else ""


def _printable(text: str) -> str:
    """The same text, with `\\` codes for what UTF-8 cannot write."""
    return text.encode(errors="backslashreplace").decode()
