"""A folder of images as a source; its layout is detected without decoding an image.

`<class>` is a folder named after a class; images in its subfolders belong to it.

1. `train/<class>/*` and `test/<class>/*`; what else parts may be called, and how they
   are distinguished from classes, is in `layout.py`. `test` is the test split; `val`
   joins train or is kept for validation. If `test` has no labelled images and `val` is
   not kept, `val` is the test split. A part that shares no class with train is
   unlabelled. With neither `test` nor `val` the source has no split.
2. `<class>/*`: no split.
3. Tiny ImageNet: `train/<wnid>/images/*`, and `val/images/*` with labels from
   `val/val_annotations.txt`.
4. Hugging Face's `metadata.csv` or `metadata.jsonl`, in the root or in a split folder.
   A row gives the path of an image, relative to the file, in one of `FILE_COLUMNS`, and
   its class in the first of `LABEL_COLUMNS` that exists; numbers are used as class
   names. In the root, the split is given by the column `split`, else by the folder of
   the image, if parts can be distinguished from classes. Rows take precedence over
   folder names. A file without a column of labels beside class folders holds captions.
   `generate` writes this layout.
5. Whatever `data.train`, `data.test` and `data.labels` say.

The names of a class may differ in case, width and separators between the parts; it is
called as in train.

`words.txt` in the root, with lines like `n01443537<TAB>goldfish, Carassius auratus`,
names WordNet ids by their first word, or by all words if two classes share the first.

Ignored are hidden files and files that operating systems leave behind, which are
counted, and, outside of class folders, files with other suffixes. For all else that is
not used, `defects` gives the reason.
"""

import collections
import dataclasses
import filecmp
import os
import posixpath
import re
import shlex
import stat
from collections.abc import Iterable, Sequence

import numpy as np

from mvc_jax.data import label_table, layout, scans
from mvc_jax.data.captions import readable
from mvc_jax.data.decode import SUFFIXES, BadImage, Decoder
from mvc_jax.data.example import Example
from mvc_jax.data.label_table import NOT_AN_IMAGE, nfc, printable, text
from mvc_jax.data.remote import Remote
from mvc_jax.data.tree import Tree
from mvc_jax.errors import UserError

_SYSTEM_FILES = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
_ARCHIVE = re.compile(r"\.(zip|7z|rar|tgz|tar(\.\w+)?)$", re.IGNORECASE)
_UNPACK = {"zip": "unzip {0} -d {1}", "7z": "7z x {0} -o{1}", "rar": "unrar x {0} {1}/"}


@dataclasses.dataclass(frozen=True)
class FolderOptions:
    """What the user says of a folder; empty: it is detected.

    Attributes:
      train: folders of the training part, relative to the root; "." is the root.
      test: folders of the test part.
      labels: `FILE:COLUMN`, a CSV or JSON lines with names of images and labels.
      each_frame: whether each frame of a DICOM file is an image, with the id
        `PATH#FRAME`; else a file of several is refused.
    """

    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    labels: str = ""
    each_frame: bool = False


class Folder:
    """A folder of images as a `Source`; ids are paths relative to the root.

    Attributes:
      class_folders: what the folder of each class is called, `class_names` are words.
      is_validation: bool [N], images kept for validation; None: there are none.
      is_remote: whether reading waits for a server.

    Args:
      root: path of the folder; `~` is expanded; or a URL of fsspec, e.g. `gs://...`.
      decoder: of the images.
      options: what the user says of it.
      keep_validation: whether validation images neither join train nor are test.

    Raises:
      UserError: there are no labelled training images, or metadata cannot be read.
    """

    def __init__(
        self,
        root: str,
        decoder: Decoder,
        options: FolderOptions = FolderOptions(),
        *,
        keep_validation: bool = False,
    ):
        tree = Tree(root)
        _walk(tree)
        try:
            base = _find_labels(tree, options)
        except layout.Ambiguous as why:
            raise tree.ambiguous(why) from why
        self._frames = _split_frames(tree) if options.each_frame else {}
        _check_labels(tree)
        names = _class_names(tree, base)
        index = {key: label for label, key in enumerate(names)}
        self._open, self._decoder = tree.open, decoder
        self.is_remote = tree.remote is not None
        self.class_names = tuple(names.values())
        folder_of = tree.folders_of_classes()
        self.class_folders = tuple(folder_of[key] for key in names)
        self.ids = tuple(sorted(tree.labels))
        labels, splits = zip(*(tree.labels[i] for i in self.ids), strict=True)
        self.labels = np.asarray([index[key] for key in labels], np.int32)
        kept = keep_validation and "val" in splits
        self.is_validation = np.asarray([s == "val" for s in splits]) if kept else None
        tests = ("test",) if kept else ("test", "val")
        test = next((name for name in tests if name in splits), None)
        self.is_test = np.asarray([name == test for name in splits]) if test else None
        self._tables = tree.rows
        self.defects = dict(sorted(tree.defects.items()))
        self.remarks = tuple(f"{top}: {text}" for top, text in tree.remarks.items())

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> list[str] | None:
        """A column of the tables as texts, "" if it is empty; None: there is none."""
        wanted = name.strip().lower()
        found = {}
        for id_, row in self._tables.items():
            for key in row:
                if key.strip().lower() == wanted:
                    found[id_] = text(row[key])
        return [found.get(id_, "") for id_ in self.ids] if found else None

    def __getitem__(self, index: int) -> Example:
        id_ = self.ids[index]
        try:
            path, frame = self._frames.get(id_, (id_, None))
            with self._open(path) as file:
                content = file.read()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error
        image, note = self._decoder(content, frame)
        return Example(image=image, label=int(self.labels[index]), id=id_, note=note)


def _walk(tree: Tree) -> None:
    """Lists everything, following links; each file is stat'ed once and not opened."""
    if tree.remote is not None:
        _walk_remote(tree, tree.remote)
        return
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


def _walk_remote(tree: Tree, remote: Remote) -> None:
    """Lists everything below a URL."""
    if not (found := remote.find()):
        raise tree.error(
            wanted="a folder with images", got="no file below it", fix="Correct it."
        )
    folders = set()
    for path, entry in found.items():
        inside = remote.name(path[len(tree.path) :].lstrip("/"))
        parts = inside.split("/")
        if any(p.startswith(".") or p.lower() in _SYSTEM_FILES for p in parts):
            tree.junk += 1
            continue
        folders |= {"/".join(parts[:k]) for k in range(1, len(parts))}
        is_image = inside.lower().endswith(SUFFIXES)
        if is_image and entry.get("size") == 0:
            tree.defects[inside] = "empty file"
        else:
            (tree.images if is_image else tree.others).append(inside)
            tree.entries[inside] = {"name": path} | entry
    tree.folders += sorted(folders)


def _add_entries(tree: Tree, prefix: str, entries: Iterable[os.DirEntry]) -> list[str]:
    """Adds the files of a folder to the tree; returns its subfolders."""
    folders = []
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FILES:
            tree.junk += 1
            continue
        path = prefix + entry.name
        is_image = entry.name.lower().endswith(SUFFIXES)
        if reason := _defect(entry, is_image):
            tree.defects[printable(path)] = reason
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


def _find_labels(tree: Tree, options: FolderOptions) -> str:
    """Detects the layout, labels the images, and explains those without label.

    Returns:
      the prefix of the folder that holds the classes or the parts.

    Raises:
      layout.Ambiguous: it could be several.
      UserError: the user named what is not there.
    """
    bad = [path for path in tree.defects if path.lower().endswith(SUFFIXES)]
    paths = sorted([*tree.images, *bad])
    explicit = bool(options.train or options.test)
    base, copies = "", {}
    if explicit:
        parts = _named_parts(tree, options)
    elif options.labels:
        parts = _parts_beside(
            tree, paths, label_table.of_option(tree, options.labels)[0]
        )
    else:
        base = _around_table(tree, paths)
        if table := label_table.find(tree, base):
            parts = _parts_of_table(tree, paths, table)
            label_table.label(tree, table, parts, splits=True)
            _explain_the_rest(tree, {}, base)
            return base
        found = _detect(tree, paths)
        parts, copies = found.parts, found.copies
        base = _above(parts)
    if options.labels:
        label_table.label_by_column(tree, options.labels, parts, explicit=explicit)
    else:
        # Train first: other parts are labelled if they share a class with it.
        for prefix in sorted(parts, key=lambda part: (parts[part] != "train", part)):
            _label_part(tree, prefix, parts, paths, skip=tuple(copies))
    for folder, count in copies.items():
        tree.remarks[folder] = f"the same {count} images as beside it are not used"
    _explain_the_rest(tree, parts, base, explicit=explicit)
    return base


def _named_parts(tree: Tree, options: FolderOptions) -> dict[str, str]:
    """Prefix -> role of the folders that the user named."""
    parts = {}
    for field, role in (("train", "train"), ("test", "test")):
        for name in getattr(options, field):
            path = posixpath.normpath(name.replace(os.sep, "/")).strip("/")
            if path != "." and path not in tree.folders:
                error = tree.error(
                    wanted=f"the folder that config.data.{field} names",
                    got=f"no {name!r} in it",
                    fix="Name one of its folders, or . for the folder itself.",
                )
                error.details = (*layout.lines(tree.images, ()), *error.details)
                raise error
            parts["" if path == "." else path + "/"] = role
    return parts if "train" in parts.values() else {"": "train"} | parts


def _parts_of_table(
    tree: Tree, paths: Sequence[str], table: label_table.Table
) -> dict[str, str]:
    """The parts by which metadata that does not split is split.

    Raises:
      layout.Ambiguous: parts and classes are not distinct.
    """
    if label_table.folders_are_classes(tree, table):
        return {"": "train"}
    try:
        return _parts_beside(tree, paths, table.path)
    except layout.Ambiguous as why:
        column = label_table.label_column(tree, table)
        raise layout.Ambiguous(
            str(why),
            f"give {table.path} a column split, of train, val or test",
            f"--config.data.labels={table.path}:{column} {why.fixes[0]}",
            f"--config.data.train={table.prefix[:-1] or '.'} if none of them is a part",
        ) from why


def _parts_beside(tree: Tree, paths: Sequence[str], table: str) -> dict[str, str]:
    """The parts by which a table of labels that does not split is split.

    Args:
      tree: the folder.
      paths: of all images, also of bad ones.
      table: the file.

    Raises:
      layout.Ambiguous: some folders are named like parts and may be something else.
    """
    try:
        parts = layout.find(paths).parts
    except layout.Ambiguous as why:
        if why.parts and not label_table.has_splits(tree, table):
            raise
        tops = {folder for folder in tree.folders if "/" not in folder}
        parts = {top + "/": role for top in tops if (role := layout.role(top)[0])}
    return {"": "train"} | parts


def _around_table(tree: Tree, paths: Sequence[str]) -> str:
    """The prefix of the folder with a table that alone holds all images, or ""."""
    prefix = posixpath.commonpath(paths) if len(paths) > 1 else ""
    for depth in range(prefix.count("/") + 1 if prefix else 0):
        inner = "/".join(prefix.split("/")[: depth + 1]) + "/"
        if layout.role(inner.split("/")[-2])[0]:
            return ""
        if not inner[:-1].lower().endswith(SUFFIXES) and label_table.find(tree, inner):
            return "" if label_table.find(tree, "") else inner
    return ""


def _detect(tree: Tree, paths: Sequence[str]) -> layout.Layout:
    """The layout of class folders, or of parts with a table in them."""
    tops = [folder for folder in tree.folders if "/" not in folder]
    roles = {top + "/": role for top in tops if (role := layout.role(top)[0])}
    tables = {prefix: label_table.find(tree, prefix) for prefix in roles}
    if any(tables[prefix] and roles[prefix] == "train" for prefix in roles):
        return layout.Layout(roles)

    def is_copy(a: str, b: str) -> bool:
        if tree.remote is not None:
            known = a in tree.entries and b in tree.entries
            return known and tree.remote.same(tree.entries[a], tree.entries[b])
        a, b = (os.path.join(tree.path, path) for path in (a, b))
        return os.path.exists(a) and filecmp.cmp(a, b, shallow=False)

    return layout.find(paths, is_copy)


def _above(parts: dict[str, str]) -> str:
    """The prefix of the folder that holds the parts."""
    tops = [prefix.rstrip("/").split("/")[:-1] for prefix in parts if prefix]
    if not tops or "" in parts:
        return ""
    common = os.path.commonprefix(tops)
    return "/".join(common) + "/" if common else ""


def _label_part(
    tree: Tree,
    prefix: str,
    parts: dict[str, str],
    paths: Sequence[str],
    skip: tuple[str, ...],
) -> None:
    """Labels the images of a part, by a table or by the first folder of their path.

    Args:
      tree: labels are added to it.
      prefix: of the part.
      parts: prefix -> role of all parts.
      paths: of all images, also of bad ones.
      skip: prefixes of folders that are not used.
    """
    role = parts[prefix]
    if table := label_table.find(tree, prefix):
        label_table.label(tree, table, parts)
        return
    inner = tuple(p for p in parts if p != prefix and p.startswith(prefix)) + skip

    def folder(path: str) -> str:
        name, slash, _ = path[len(prefix) :].partition("/")
        mine = path.startswith(prefix) and not path.startswith(inner)
        return name if slash and mine else ""

    known = set(tree.classes)
    names = {name for name in map(folder, paths) if name}
    keys = {name: tree.class_of(nfc(name), known) for name in names}
    if role == "pred" or (
        role != "train" and known and known.isdisjoint(keys.values())
    ):
        return
    tree.classes.update(keys.values())
    for name, key in keys.items() if role == "train" else ():
        tree.class_folders.setdefault(key, set()).add(name)
    for path in tree.images:
        if name := folder(path):
            tree.labels[path] = (keys[name], role)
    for path in tree.others:
        name = folder(path)
        if name in keys and not path.endswith(f"/{name}_boxes.txt"):  # Tiny ImageNet's
            is_volume = path.lower().endswith(scans.NIFTI_SUFFIXES)
            tree.defects[path] = scans.NIFTI if is_volume else NOT_AN_IMAGE
    for path in set(tree.folders) - tree.defects.keys():
        name = path[len(prefix) :]
        is_outer = any(other.startswith(f"{path}/") for other in inner)
        is_top = path.startswith(prefix) and "/" not in name
        if is_top and name not in keys and not is_outer:
            tree.defects[path + "/"] = "a folder without images"


def _split_frames(tree: Tree) -> dict[str, tuple[str, int]]:
    """Labels the frames of DICOM files in their place; id -> its file and frame."""

    def count(path: str) -> int | str:
        """Its frames, or why they cannot be counted."""
        try:
            with tree.open(path) as file:
                return scans.frames_of_dicom(file.read())
        except UserError:
            raise
        except scans.Unreadable as error:
            return str(error)
        except Exception as error:  # of pydicom, for damaged headers
            return f"damaged: {error or type(error).__name__}"

    frames = {}
    paths = [p for p in tree.labels if p.lower().endswith(scans.DICOM_SUFFIXES)]
    for path, found in zip(paths, tree.map(count, paths), strict=True):
        label = tree.labels.pop(path)
        if isinstance(found, str):
            tree.defects[path] = found
            continue
        for k in range(found):
            id_ = f"{path}#{k:04d}"
            tree.labels[id_], frames[id_] = label, (path, k)
    return frames


def _explain_the_rest(
    tree: Tree, parts: dict[str, str], base: str, *, explicit: bool = False
) -> None:
    """Explains images without label, once for each folder where none has any.

    Args:
      tree: defects and remarks are added to it.
      parts: prefix -> role.
      base: prefix of the folder that holds the classes or the parts.
      explicit: whether the user named the parts, so that the rest is not wanted.
    """

    def group(path: str) -> str:
        inside = [prefix for prefix in parts if prefix and path.startswith(prefix)]
        if inside:
            return max(inside, key=len)
        top, slash, _ = path[len(base) :].partition("/")
        return f"{base}{top}/" if slash and path.startswith(base) else ""

    used = {group(path) for path in tree.labels}
    unused = collections.Counter()
    for path in set(tree.images) - tree.labels.keys() - tree.defects.keys():
        top = group(path)
        if any(path.startswith(folder) for folder in tree.remarks):
            continue
        if top and top not in used:
            unused[top] += 1
        else:
            tree.defects[path] = "no label: in no class folder, in no row of metadata"
    for top, count in sorted(unused.items()):
        is_part = explicit or layout.role(top[len(base) :].split("/")[0])[0]
        texts = tree.remarks if is_part else tree.defects
        texts[top] = f"{count} images without labels are not used"
    if tree.junk:
        what = "hidden files and files of operating systems are not used"
        tree.remarks[f"{tree.junk} files"] = what


def _check_labels(tree: Tree) -> None:
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
    tops = {path.partition("/")[0] for path in tree.images if "/" in path}
    if any(layout.role(top)[0] for top in tops):
        fix = f"If its folders are classes, set --config.data.train=. . {fix}"
    tables = [path for path in tree.others if path.lower().endswith(".csv")]
    if tables and tree.images:
        fix = (
            "If a file has their names and labels, name it and its column of labels: "
            f"--config.data.labels={tables[0]}:COLUMN. {fix}"
        )
    if any(path.lower().endswith(scans.NIFTI_SUFFIXES) for path in tree.others):
        fix = f"There is {scans.NIFTI}. {fix}"
    wanted = "labelled training images, in train/<class>/, <class>/ or metadata"
    error = tree.error(wanted=wanted, got=got, fix=fix)
    if tree.images:
        error.details = (*layout.lines(tree.images, tree.others), *error.details)
    raise error


def _class_names(tree: Tree, base: str) -> dict[str, str]:
    """Class -> its name, distinct where words.txt allows, in the order of labels.

    That is the order of the folders, as torchvision's `ImageFolder` numbers them.
    """
    known = [p for p in (f"{base}words.txt", "words.txt") if p in tree.others]
    words = label_table.parse(tree, known[0]) if known else []
    glosses = {row["file_name"]: text(row["label"]) for row in words}
    folder_of = tree.folders_of_classes()
    ordered = sorted(tree.classes, key=lambda key: (folder_of[key], key))
    forms = {key: (key, key, key) for key in ordered}
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
