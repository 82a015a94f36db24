"""Labels of a folder's images in a file: metadata, Tiny ImageNet's lists, a CSV."""

import collections
import csv
import functools
import json
import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from mvc_jax.data import layout
from mvc_jax.data.layout import Ambiguous, class_key
from mvc_jax.data.tree import Tree
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
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description")
NOT_AN_IMAGE = "not a PNG, JPEG, WebP, TIFF or BMP name"
_SPLITS = ("train", "val", "test")
nfc = functools.partial(unicodedata.normalize, "NFC")  # macOS stores é decomposed


class Table(NamedTuple):
    """A file of labels, and the folder that its paths are relative to."""

    path: str
    prefix: str


def find(tree: Tree, prefix: str) -> Table | None:
    """The file of labels in a folder, None if there is none.

    Raises:
      UserError: there are two.
    """
    names = (prefix + "metadata.csv", prefix + "metadata.jsonl")
    found = [name for name in names if name in tree.others]
    if len(found) == 2:
        got = " and ".join(found)
        raise tree.error(wanted="one metadata file", got=got, fix="Delete one of them.")
    if found:
        return (
            None if _holds_captions(tree, found[0], prefix) else Table(*found, prefix)
        )
    boxes, images = prefix + "val_annotations.txt", prefix + "images/"
    # Some users move the images of val/ into class folders and keep the file.
    in_use = boxes in tree.others and any(p.startswith(images) for p in tree.images)
    return Table(boxes, images) if in_use else None


def _holds_captions(tree: Tree, path: str, prefix: str) -> bool:
    """Whether metadata has captions and no labels, which class folders give."""
    above = (p[len(prefix) :] for p in tree.images if p.startswith(prefix))
    if not any("/" in name for name in above):
        return False
    columns = {key.strip().lower() for row in parse(tree, path) for key in row if key}
    if columns & {*LABEL_COLUMNS} or not columns & {*CAPTION_COLUMNS}:
        return False
    how = "they are not used"
    if path == "metadata.jsonl" and columns & {"text", "caption"}:
        how = (
            "use them with --config.caption.captioner=file "
            f"--config.caption.file={posixpath.join(tree.name, path)}"
        )
    tree.remarks[path] = f"captions, not labels: {how}"
    return True


def label(
    tree: Tree, table: Table, parts: dict[str, str], *, splits: bool = False
) -> None:
    """Labels images by the rows of a table.

    Args:
      tree: labels are added to it.
      table: the file.
      parts: prefix -> role, for images that have no split in the file.
      splits: whether a column `split` is used.
    """
    path, prefix = table
    rows = parse(tree, path)
    columns = _columns(rows)
    file_column = _column(tree, path, columns, FILE_COLUMNS)
    label_column = _column(tree, path, columns, LABEL_COLUMNS)
    split_column = columns.get("split") if splits else None
    here, others = os.path.basename(path), set(tree.others)
    below = [*tree.defects, *tree.others, *tree.images]
    on_disk = {nfc(p[len(prefix) :]): p for p in below if p.startswith(prefix)}
    known = set(tree.classes)
    for number, row in enumerate(rows, start=1):
        name, label_ = text(row.get(file_column)), text(row.get(label_column))
        if row.get(file_column) in on_disk:  # also if it begins with a blank
            name = row[file_column]
        if row.get(label_column) in name.split("/")[:-1]:
            label_ = nfc(row[label_column])
        inside = name  # as it is, or with Windows' slashes
        if name not in on_disk:
            inside = posixpath.normpath(name.replace("\\", "/"))
        image = on_disk.get(inside, prefix + inside)
        if split_column:
            split = text(row.get(split_column))
            role = layout.role(split)[0]
        else:
            split, role = "", role_of(image, parts)
        label_ = label_ and tree.class_of(label_, known)
        tree.classes |= {label_} - {""}
        if not name:
            image, reason = f"{path}, row {number}", "no file name"
        elif image in tree.defects:
            continue
        elif inside.startswith(("/", "../")) or inside == "..":
            reason = f"listed in {here}, outside of its folder"
        elif inside not in on_disk:
            hidden = any(folder.startswith(".") for folder in inside.split("/"))
            what = "in a hidden folder, which is not read" if hidden else "no such file"
            reason = f"listed in {here}, {what}"
        elif image in others:
            reason = NOT_AN_IMAGE
        elif not label_:
            reason = f"no label: {here} gives none"
        elif role not in _SPLITS:
            reason = f"split {split!r} in {here} is neither train, val nor test"
        else:
            reason = _add(tree, image, (label_, role), here)
            tree.rows[image] = row
            if role == "train":
                part = part_of(image, parts)
                inner = image[len(part if part.startswith(prefix) else prefix) :]
                top, slash, _ = inner.partition("/")
                if slash:
                    tree.class_folders.setdefault(label_, set()).add(top)
        if reason:
            tree.defects[image] = reason


def label_by_column(
    tree: Tree, option: str, parts: dict[str, str], *, explicit: bool
) -> None:
    """Labels images by `data.labels`, a file and the column of labels in it.

    The column of names is the one with the most names of images, with or without
    suffix and folder.

    Args:
      tree: labels are added to it.
      option: `FILE:COLUMN`; the file is relative to the tree.
      parts: prefix -> role.
      explicit: whether the user named the parts.

    Raises:
      UserError: there is no such file or column, or no image's name is in it.
    """
    path, wanted = of_option(tree, option)
    rows = parse(tree, path)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if wanted not in columns:
        shown = ", ".join(columns) or "(no rows)"
        got = f"a file with the columns {shown}"
        raise _error(option, "one of its columns after the colon", got, path)
    role = layout.role(os.path.splitext(os.path.basename(path))[0])[0]
    images = [i for i in tree.images if not explicit or role_of(i, parts) in _SPLITS]
    of_name = _names(images, parts, role)
    known_names = _names(sorted(tree.defects), parts, role)
    hits = {
        column: sum(text(row.get(column)) in of_name for row in rows)
        for column in columns
        if column != wanted
    }
    names = max(hits, key=hits.get, default=None)
    if not hits or not hits[names]:
        example = next(iter(tree.images), "(none)")
        got = f"no name of an image, such as {example}, in {', '.join(columns)}"
        raise _error(option, "a file with names of images", got, path)
    splits = next((c for c in columns if c.strip().lower() == "split"), None)
    here = os.path.basename(path)
    for number, row in enumerate(rows, start=1):
        name, class_ = text(row.get(names)), text(row.get(wanted))
        tree.classes |= {class_} - {""}
        found = of_name.get(name, ())
        if len(found) > 1:
            raise tree.ambiguous(
                Ambiguous(
                    f"{name!r} in {here}, which may be {found[0]} or {found[1]}",
                    "--config.data.train=FOLDER to name the folder of its images",
                )
            )
        image = found[0] if found else f"{here}, row {number}"
        if image in tree.defects or (not found and name in known_names):
            continue
        split = role_of(image, parts) if found else ""
        if splits is not None:
            split = layout.role(text(row.get(splits)))[0]
        if not found:
            reason = f"{name!r}, no such image"
        elif not class_:
            reason = f"no label: {here} gives none"
        elif split not in _SPLITS:
            reason = f"in {here}, but of no split"
        else:
            reason = _add(tree, image, (class_, split), here)
            tree.rows[image] = row
        if reason:
            tree.defects[image] = reason


def of_option(tree: Tree, option: str) -> tuple[str, str]:
    """The file and the column that `data.labels` names.

    Raises:
      UserError: there is no such file.
    """
    path, _, column = option.rpartition(":")
    path = os.path.normpath(path or column)
    if path not in tree.others and not os.path.isfile(os.path.join(tree.path, path)):
        raise _error(option, f"a file in {tree.name}, and a column", "no such file", "")
    return path, column


def _names(
    images: Sequence[str], parts: dict[str, str], role: str
) -> dict[str, list[str]]:
    """What a row may call an image -> images; those of the file's own part first."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for image in images:
        base = os.path.basename(image)
        names = {image, base, os.path.splitext(image)[0], os.path.splitext(base)[0]}
        for name in names:
            found[nfc(name)].append(image)
    for name, same in found.items():
        if role and len(same) > 1:
            own = [i for i in same if role_of(i, parts, by_name=True) == role]
            found[name] = own or same
    return dict(found)


def role_of(image: str, parts: dict[str, str], *, by_name: bool = False) -> str:
    """The role of the innermost part that an image is in, "" if it is in none.

    Args:
      image: its path.
      parts: prefix -> role.
      by_name: whether the name of its folder counts as well.
    """
    if part := part_of(image, parts):
        return parts[part]
    if by_name and (named := layout.role(image.partition("/")[0])[0]):
        return named
    return parts.get("", "")


def part_of(image: str, parts: dict[str, str]) -> str:
    """The prefix of the innermost part that an image is in, "" if it is in none."""
    found = [prefix for prefix in parts if prefix and image.startswith(prefix)]
    return max(found, key=len, default="")


def folders_are_classes(tree: Tree, table: Table) -> bool:
    """Whether the folders of a table in the root are its classes, and no parts.

    That is where every row's label is the name of its folder, or every folder has one
    label and every label one folder.
    """
    rows = parse(tree, table.path)
    columns = _columns(rows)
    names = next((columns[c] for c in FILE_COLUMNS if c in columns), None)
    labels = next((columns[c] for c in LABEL_COLUMNS if c in columns), None)
    pairs = [(text(row.get(names)), text(row.get(labels))) for row in rows]
    pairs = {(name.partition("/")[0], label_) for name, label_ in pairs}
    one_to_one = len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs})
    return (one_to_one and len(pairs) > 1) or all(
        class_key(folder) == class_key(label_) for folder, label_ in pairs
    )


def label_column(tree: Tree, table: Table) -> str:
    """The name of a table's column of labels, as it is written there."""
    columns = _columns(parse(tree, table.path))
    return _column(tree, table.path, columns, LABEL_COLUMNS)


def has_splits(tree: Tree, path: str) -> bool:
    """Whether a file of labels has a column `split`."""
    return "split" in _columns(parse(tree, path))


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Columns by their names in lower case."""
    return {key.strip().lower(): key for row in rows for key in row}


def _add(tree: Tree, image: str, entry: tuple[str, str], here: str) -> str:
    """Adds the label and split of an image; returns why it cannot be used, or ""."""
    if (first := tree.labels.setdefault(image, entry)) == entry:
        return ""
    del tree.labels[image]
    return f"listed in {here} as {first} and as {entry}"


def _error(option: str, wanted: str, got: str, path: str) -> UserError:
    return UserError(
        f"config.data.labels={option}",
        wanted=wanted,
        got=got,
        fix=f"Write e.g. --config.data.labels={path or 'train.csv'}:label.",
    )


def parse(tree: Tree, path: str) -> list[dict[str, Any]]:
    """Parses a text file into rows.

    Raises:
      UserError: it is malformed; the message names the line.
    """
    number = 0
    suffix = os.path.splitext(path)[1].lower()
    parser: Callable = _PARSERS.get(suffix, _csv)

    def lines() -> Iterator[str]:
        nonlocal number
        with tree.open(path) as file:
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


def _column(tree: Tree, table: str, columns: dict[str, str], names: tuple) -> str:
    for name in names:
        if name in columns:
            return columns[name]
    raise tree.error(
        wanted=f"a column {' or '.join(names)} in {table}",
        got=f"the columns {', '.join(columns.values()) or '(no rows)'}",
        fix="Rename one of its columns.",
    )


def text(value: Any) -> str:
    """A cell as text, "" if it is neither text nor a number."""
    is_text = isinstance(value, str | int | float)
    return nfc(printable(str(value)).strip()) if is_text else ""


def printable(text_: str) -> str:
    """Replaces what UTF-8 cannot encode by backslash escapes."""
    return text_.encode(errors="backslashreplace").decode()
