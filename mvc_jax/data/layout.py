"""Which folders of a tree are parts (train, test, ...), and which are classes.

Names suggest, structure decides: a folder is a part if its name has a word of `WORDS`
and it holds the same class folders as its siblings. Classes may be called `train`,
`valid` or `test tube`. What is not distinct raises `Ambiguous`.
"""

import collections
import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

WORDS = {  # word in a name -> role of the part
    "train": "train",
    "training": "train",
    "trainval": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "pred": "pred",  # images to predict, without labels
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_MAX_LINES = 30  # of a tree that is shown


class Ambiguous(Exception):
    """Folders that could be parts or classes.

    Args:
      got: what was found.
      fixes: ways out, as imperative phrases.
      parts: whether some of these folders are named like parts, so that the question
        stays where labels are known from elsewhere.
    """

    def __init__(self, got: str, *fixes: str, parts: bool = False):
        super().__init__(got)
        self.fixes, self.parts = fixes, parts


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of a tree.

    Attributes:
      parts: prefix of a part, e.g. `"train/"`, or `""` for the tree itself -> role.
      copies: folder that holds the same files again as its siblings -> their number.
    """

    parts: dict[str, str]
    copies: dict[str, int] = dataclasses.field(default_factory=dict)


@functools.lru_cache(maxsize=100_000)
def class_key(name: str) -> str:
    """What two names of a class have in common: not case, width or separators.

    Between digits a separator counts, as in `3_5` and `35`; so does a sign.
    """
    key = unicodedata.normalize("NFKC", name).casefold()
    key = unicodedata.normalize("NFKC", key)
    key = re.sub(r"[\s_]+", " ", key).strip()
    key = re.sub(r"(?<=\w) ?-+ ?(?=\w)", " ", key)
    return re.sub(r"(?<!\d) | (?!\d)", "", key)


def role(name: str) -> tuple[str, tuple[str, ...]]:
    """The role that a name suggests, "" if none, and its other words."""
    words = [word.lower() for word in _WORD.findall(name)]
    roles = {WORDS[word] for word in words if word in WORDS}
    rest = tuple(word for word in words if word not in WORDS)
    if roles == {"train", "val"}:
        return "train", rest
    return (roles.pop(), rest) if len(roles) == 1 else ("", rest)


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A folder with images below it.

    Attributes:
      name: of the folder.
      prefix: its path with a slash, that of the inner folder where a level is repeated.
      inside: paths below `prefix`.
      folders: name of a folder in it -> number of images below.
      flat: whether images are directly in it.
    """

    name: str
    prefix: str
    inside: tuple[str, ...]
    folders: dict[str, int]
    flat: bool

    @functools.cached_property
    def keys(self) -> set[str]:
        return set(map(class_key, self.folders))

    @property
    def role(self) -> str:
        return role(self.name)[0]

    @property
    def rest(self) -> tuple[str, ...]:
        return role(self.name)[1]


def find(
    paths: Sequence[str], is_copy: Callable[[str, str], bool] = lambda a, b: True
) -> Layout:
    """Finds the parts of a tree, given the paths of all its images.

    Args:
      paths: of the images, relative to the tree.
      is_copy: whether two of these files have the same content.

    Raises:
      Ambiguous: parts and classes are not distinct.
    """
    return _find(paths, is_copy, "")


def _find(
    paths: Sequence[str], is_copy: Callable[[str, str], bool], outer: str
) -> Layout:
    """`find` in a folder of the tree, whose prefix is `outer`; `paths` are below it."""
    tops, copies = _without_copies(_folders(paths, outer), is_copy, outer)
    if parts := _parts(tops, outer):
        return Layout(parts, copies)
    if len(tops) != 1:
        _require_different(tops, outer)
        return Layout({outer: "train"}, copies)
    inner = top = tops[0]
    repeated = True
    while not inner.flat and len(inner.folders) == 1:
        (deeper,) = _folders(inner.inside, inner.prefix)
        repeated &= class_key(deeper.name) == class_key(top.name)
        inner = deeper
    if inner.flat or len(inner.folders) < 2:
        return Layout({outer: "train"}, copies)
    prefix = inner.prefix
    below = _find(inner.inside, is_copy, prefix)
    is_inner = prefix != f"{outer}{top.name}/"
    if below.parts != {prefix: "train"} or (is_inner and repeated):
        return Layout(below.parts, copies | below.copies)
    raise Ambiguous(
        f"one folder, {prefix}, around {len(inner.folders)} others, which could be "
        "classes, or parts of one class",
        f"--config.data.train={prefix[:-1]} if the inner folders are the classes",
        f"--config.data.train={_named(outer)} if the outer one is a class",
    )


def _folders(paths: Iterable[str], prefix: str) -> list[_Folder]:
    """The folders at the top of `paths`, which are relative to `prefix`."""
    below: dict[str, list[str]] = collections.defaultdict(list)
    for path in paths:
        name, slash, rest = path.partition("/")
        if slash:
            below[name].append(rest)
    found = []
    for name, inside in sorted(below.items()):
        folder = _folder(name, f"{prefix}{name}/", inside)
        if not folder.flat and len(folder.folders) == 1:
            (inner,) = folder.folders
            same_role = folder.role and role(inner)[0] == folder.role
            if same_role or class_key(inner) == class_key(name):  # a repeated level
                inside = [path.partition("/")[2] for path in inside]
                folder = _folder(name, f"{folder.prefix}{inner}/", inside)
        found.append(folder)
    return found


def _folder(name: str, prefix: str, inside: list[str]) -> _Folder:
    parts = (path.partition("/") for path in inside)
    tops = collections.Counter(top if slash else "" for top, slash, _ in parts)
    flat = tops.pop("", 0) > 0
    return _Folder(name, prefix, tuple(inside), dict(tops), flat)


def _without_copies(
    tops: list[_Folder], is_copy: Callable[[str, str], bool], outer: str
) -> tuple[list[_Folder], dict[str, int]]:
    """Leaves out folders that hold their siblings, with the same files, again."""
    siblings = {class_key(top.name): top for top in tops}
    kept, copies = [], {}
    for top in tops:
        inner = {class_key(name): name for name in top.folders}
        twins = inner.keys() & siblings.keys() - {class_key(top.name)}
        if len(twins) < 2:
            kept.append(top)
            continue
        beside = {
            f"{inner[key]}/{path}": siblings[key].prefix + path
            for key in twins
            for path in siblings[key].inside
        }
        if all(
            path in beside and is_copy(top.prefix + path, beside[path])
            for path in top.inside
        ):
            copies[f"{outer}{top.name}/"] = len(top.inside)
            continue
        names = ", ".join(sorted(inner[key] for key in twins)[:4])
        raise Ambiguous(
            f"the folders {names}, and others of these names in {top.prefix}",
            f"--config.data.train={top.prefix[:-1]} to use that folder alone",
            "move that folder elsewhere",
            parts=bool(top.role) or any(siblings[key].role for key in twins),
        )
    return kept, copies


def _parts(tops: list[_Folder], outer: str) -> dict[str, str]:
    """Prefix -> role of each part; empty: these folders are classes."""
    named = [top for top in tops if top.role]
    others = [top for top in tops if not top.role]
    trains = [top for top in named if top.role == "train" and top.folders]
    parts = {top.prefix: top.role for top in named}
    if not trains:
        return parts if _are_parts_without_labels(named, others, outer) else {}
    linked = any(_share_classes(a, b) for a in trains for b in named if a is not b)
    if len(trains) == len(named) > 1 and not linked:  # bullet_train/, freight_train/
        return {}
    same_rest = len({top.rest for top in named}) == 1
    if others:
        alike = [any(top.keys & train.keys for train in trains) for top in others]
        is_clear = (linked and same_rest and not any(alike)) or (
            len(named) == 1 and all(alike) and all(top.flat for top in others)
        )
    else:
        is_clear = linked or same_rest
    if not is_clear:
        names = ", ".join(top.name for top in [*named, *others][:6])
        tests = [top.prefix[:-1] for top in named if top.role == "test"]
        more = f" --config.data.test={tests[0]}" if tests else ""
        raise Ambiguous(
            f"the folders {names}, of which some are named like parts of a dataset",
            f"--config.data.train={trains[0].prefix[:-1]}{more} if these are parts",
            f"--config.data.train={_named(outer)} if all of them are classes",
            parts=True,
        )
    return parts


def _share_classes(train: _Folder, other: _Folder) -> bool:
    """Whether a part has class folders of `train`; train_1 and train_2 may be parts."""
    if other.role == "train" and _without_digits(train) != _without_digits(other):
        return False
    return bool(train.keys & other.keys)


def _are_parts_without_labels(
    named: list[_Folder], others: list[_Folder], outer: str
) -> bool:
    """Whether folders are parts although none for training has class folders.

    Raises:
      Ambiguous: they are beside other folders.
    """
    pairs = itertools.combinations(named, 2)
    family = [{a.role, b.role} for a, b in pairs if a.rest == b.rest]
    family = [roles for roles in family if len(roles) == 2]
    if not others:
        return len(named) == 1 or bool(family)
    shared = any(a.keys & b.keys for a in named for b in others)
    if shared or any("train" in roles for roles in family):
        raise Ambiguous(
            f"{', '.join(top.name for top in named[:4])}, named like parts of a "
            f"dataset, beside {', '.join(top.name for top in others[:4])}",
            "--config.data.train=FOLDER and --config.data.test=FOLDER to name parts",
            f"--config.data.train={_named(outer)} if all of them are classes",
            parts=True,
        )
    return False


def _without_digits(top: _Folder) -> tuple[str, ...]:
    return tuple(word for word in top.rest if not word.isdigit())


def _require_different(tops: list[_Folder], outer: str) -> None:
    """Raises `Ambiguous` if folders hold folders of the same names."""
    holders: dict[str, list[int]] = collections.defaultdict(list)
    for number, top in enumerate(tops):
        for key in top.keys if len(top.keys) > 1 else ():
            holders[key].append(number)
    pairs = collections.Counter(
        pair
        for numbers in holders.values()
        for pair in itertools.combinations(numbers[:50], 2)
    )
    for (a, b), count in pairs.items():
        if count > 1:
            same = sorted(n for n in tops[a].folders if class_key(n) in tops[b].keys)
            one, other = (tops[k].prefix[:-1] for k in (a, b))
            raise Ambiguous(
                f"folders {', '.join(same[:4])} in both {one}/ and {other}/",
                f"--config.data.train={one} if these are parts with classes in them "
                f"(add --config.data.test={other} if that one is test)",
                f"--config.data.train={_named(outer)} if the outer folders are the "
                "classes",
            )


def _named(prefix: str) -> str:
    """What `data.train` calls the folder of a prefix."""
    return prefix[:-1] or "."


def lines(images: Sequence[str], others: Sequence[str]) -> list[str]:
    """The first levels of a tree, with numbers of images, for a message."""
    counts = collections.Counter()
    for path in images:
        *above, _ = path.split("/")
        for depth in range(1, min(len(above), 3) + 1):
            counts["/".join(above[:depth]) + "/"] += 1
    shown = [f"{path}  {count} images" for path, count in sorted(counts.items())]
    loose = sum("/" not in path for path in images)
    shown += [f"{loose} images outside of folders"] if loose else []
    shown += [path for path in others if "/" not in path][:5]
    rest = len(shown) - _MAX_LINES
    return shown[:_MAX_LINES] + ([f"... and {rest} more"] if rest > 0 else [])
