"""A folder of images as a source; its layout is detected without decoding an image.

`<class>` is a folder named after a class; images in its subfolders belong to it.

1. `train/<class>/*` and `test/<class>/*`. Split folders may also be called `training`,
   `testing`, `val`, `valid` and `validation`, in any case. `test` is the test split and
   `val` joins train; if `test` has no labelled images, `val` is the test split. A split
   folder that shares no class with train is unlabelled. With neither `test` nor `val`
   the source has no split.
2. `<class>/*`: no split.
3. Tiny ImageNet: `train/<wnid>/images/*`, and `val/images/*` with labels from
   `val/val_annotations.txt`.
4. Hugging Face's `metadata.csv` or `metadata.jsonl`, in the root or in a split folder.
   A row gives the path of an image, relative to the file, in one of `FILE_COLUMNS`, and
   its class in the first of `LABEL_COLUMNS` that exists; numbers are used as class
   names. In the root, the split is given by the column `split`, else by the folder of
   the image. Rows take precedence over folder names. `generate` writes this layout.

`words.txt` in the root, with lines like `n01443537<TAB>goldfish, Carassius auratus`,
names WordNet ids by their first word, or by all words if two classes share the first.

Ignored are hidden files, files that operating systems leave behind and, outside of
class folders, files with other suffixes. For all else that is not used, `defects` gives
the reason.
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
LABEL_COLUMNS = (
    "label_name",  # first, since `label` is a number where both exist
    "class_name",
    "category_name",
    "label",
    "class",
    "category",
    "target",
)
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
_SYSTEM_FILES = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
_ARCHIVE = re.compile(r"\.(zip|7z|rar|tgz|tar(\.\w+)?)$", re.IGNORECASE)
_UNPACK = {"zip": "unzip {0} -d {1}", "7z": "7z x {0} -o{1}", "rar": "unrar x {0} {1}/"}
_NOT_AN_IMAGE = "not a PNG, JPEG, WebP, TIFF or BMP name"
_nfc = functools.partial(unicodedata.normalize, "NFC")  # macOS stores é decomposed


class Folder:
    """A folder of images as a `Source`; ids are paths relative to the root.

    Args:
      root: path of the folder; `~` is expanded.
      decoder: of the images.

    Raises:
      UserError: there are no labelled training images, or metadata cannot be read.
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
        labels, splits = zip(*(tree.labels[i] for i in self.ids), strict=True)
        self.labels = np.asarray([index[key] for key in labels], np.int32)
        test = next((name for name in ("test", "val") if name in splits), None)
        self.is_test = np.asarray([name == test for name in splits]) if test else None
        self.defects = dict(sorted(tree.defects.items()))
        self.remarks = tuple(f"{top}: {text}" for top, text in tree.remarks.items())

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
    """The contents of a folder, as paths relative to it, and what is known of them.

    Attributes:
      images: files with the suffix of an image.
      others: all other files.
      folders: all folders.
      defects: path -> the reason why it is not used.
      remarks: folder -> why it is ignored on purpose.
      labels: image -> (class, split), where the split is a value of `_SPLITS`.
      classes: all that occur, including those whose images are all defects.
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
    """Lists everything, following links; each file is stat'ed once and not opened."""
    pending: list[tuple[str, tuple]] = [("", ())]
    while pending:
        folder, above = pending.pop()
        path = os.path.join(tree.path, folder)
        try:
            here = os.path.join(os.path.realpath(path), "")  # ends with a slash
            if os.path.islink(path) and any(real.startswith(here) for real in above):
                tree.defects[folder] = "a link to one of its parent folders"
                continue
            with os.scandir(path) as entries:
                inside = _add_entries(tree, folder and folder + "/", entries)
        except OSError as error:
            tree.defects[folder or "."] = f"cannot be read: {error.strerror}"
            continue
        tree.folders += inside
        pending += [(name, (*above, here)) for name in inside]
    for names in (tree.images, tree.others, tree.folders):
        names.sort()  # the order of the file system is arbitrary


def _add_entries(tree: _Tree, prefix: str, entries: Iterable[os.DirEntry]) -> list[str]:
    """Adds the files of a folder to the tree; returns its subfolders."""
    folders = []
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FILES:
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
    """What is wrong with a file or folder, "" if nothing; the file is not opened."""
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
        return "not a regular file"  # e.g. a pipe, which would block its reader
    if not status.st_size:
        return "empty file"
    return "" if os.access(entry.path, os.R_OK) else "cannot be read: Permission denied"


def _find_labels(tree: _Tree) -> None:
    """Detects the layout, and labels the images accordingly."""
    tops = {folder for folder in tree.folders if "/" not in folder}
    splits = {top: _SPLITS[top.lower()] for top in tops if top.lower() in _SPLITS}
    # A class may be called `test`, but not where every folder has the name of a split.
    is_split = "train" in splits.values() or len(splits) == len(tops)
    if _table(tree, "") or not is_split:
        splits = {"": "train"}
    # Train first: other splits are labelled if they share a class with it.
    for top in sorted(splits, key=lambda top: (splits[top] != "train", top)):
        prefix = top and top + "/"
        if found := _table(tree, prefix):
            _label_by_table(tree, *found)
        else:
            _label_by_folder(tree, prefix, splits[top])


def _label_by_folder(tree: _Tree, prefix: str, split: str) -> None:
    """Labels images below `prefix` by the first folder of their path."""

    def folder(path: str) -> str:
        name, slash, _ = path[len(prefix) :].partition("/")
        return name if slash and path.startswith(prefix) else ""

    bad = [path for path in tree.defects if path.lower().endswith(SUFFIXES)]
    keys = {name: _nfc(name) for name in map(folder, [*tree.images, *bad]) if name}
    if split != "train" and tree.classes and tree.classes.isdisjoint(keys.values()):
        return
    tree.classes.update(keys.values())
    for path in tree.images:
        if name := folder(path):
            tree.labels[path] = (keys[name], split)
    for path in tree.others:
        name = folder(path)
        if name in keys and not path.endswith(f"/{name}_boxes.txt"):  # Tiny ImageNet's
            tree.defects[path] = _NOT_AN_IMAGE
    for path in set(tree.folders) - tree.defects.keys():
        name = path[len(prefix) :]
        if path.startswith(prefix) and "/" not in name and name not in keys:
            tree.defects[path + "/"] = "a folder without images"


def _table(tree: _Tree, prefix: str) -> tuple[str, str] | None:
    """The file of labels in a folder, and the folder that its paths are relative to."""
    names = (prefix + "metadata.csv", prefix + "metadata.jsonl")
    found = [name for name in names if name in tree.others]
    if len(found) == 2:
        got = " and ".join(found)
        raise tree.error(wanted="one metadata file", got=got, fix="Delete one of them.")
    if found:
        return found[0], prefix
    boxes, images = prefix + "val_annotations.txt", prefix + "images/"
    # Some users move the images of val/ into class folders and keep the file.
    in_use = boxes in tree.others and any(p.startswith(images) for p in tree.images)
    return (boxes, images) if in_use else None


def _label_by_table(tree: _Tree, table: str, prefix: str) -> None:
    """Labels images below `prefix` by the rows of a table."""
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
        # Without the column, an image outside of all split folders is for training.
        default = "" if split_column else "train"
        entry = (label, _SPLITS.get(split.lower(), default))
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
        elif not entry[1]:
            reason = f"split {split!r} in {here} is neither train, val nor test"
        elif (first := tree.labels.setdefault(path, entry)) != entry:
            del tree.labels[path]
            reason = f"listed in {here} as {first} and as {entry}"
        else:
            continue
        tree.defects[path] = reason


def _parse(tree: _Tree, path: str, parser: Callable) -> list[dict[str, Any]]:
    """Parses a text file into rows; errors name the line."""
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
            fix="Fix that line.",
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
    """Tiny ImageNet's tab-separated files: file name and wnid, or wnid and names."""
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
        fix="Rename one of its columns.",
    )


def _explain_the_rest(tree: _Tree) -> None:
    """Explains images without label, once per top-level folder where none has any."""
    used = {path.split("/")[0] for path in tree.labels}
    unused = collections.Counter()
    for path in set(tree.images) - tree.labels.keys() - tree.defects.keys():
        top, slash, _ = path.partition("/")
        if slash and top not in used:
            unused[top + "/"] += 1
        else:
            tree.defects[path] = "no label: in no class folder, in no row of metadata"
    for top, count in unused.items():
        texts = tree.remarks if top[:-1].lower() in _SPLITS else tree.defects
        texts[top] = f"{count} images without labels are not used"


def _check_labels(tree: _Tree) -> None:
    """Raises a `UserError` unless there are labelled training images."""
    if any(split == "train" for _, split in tree.labels.values()):
        return
    kinds = collections.Counter(os.path.splitext(p)[1].lower() for p in tree.others)
    found = [f"{n} {kind or 'other'} files" for kind, n in kinds.most_common(4)]
    found = [f"{len(tree.images)} images", *found, f"{len(tree.folders)} folders"]
    got = ", ".join([*found, f"{len(tree.defects)} defects"])
    files = [os.path.join(tree.path, path) for path in tree.others]
    if "." in tree.defects:
        got, files = f"a path that {tree.defects['.']}", [tree.path]
    fix = "mvc_jax/data/folder.py lists the supported layouts."
    archive = next(filter(_ARCHIVE.search, files), None)
    if archive and not tree.images:
        kind = _ARCHIVE.search(archive)[1].lower()
        command = _UNPACK.get(kind, "mkdir -p {1} && tar -xf {0} -C {1}")
        paths = (archive, _ARCHIVE.sub("", tree.path))
        fix = f"Unpack it: {command.format(*map(shlex.quote, paths))}"
    wanted = "labelled training images, in train/<class>/, <class>/ or metadata"
    raise tree.error(wanted=wanted, got=got, fix=fix)


def _class_names(tree: _Tree) -> dict[str, str]:
    """Names of the classes in the order of labels, distinct where words.txt allows."""
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
    """A cell as text, "" if it is neither text nor a number."""
    is_text = isinstance(value, str | int | float)
    return _nfc(_printable(str(value)).strip()) if is_text else ""


def _printable(text: str) -> str:
    """Replaces what UTF-8 cannot encode by backslash escapes."""
    return text.encode(errors="backslashreplace").decode()
