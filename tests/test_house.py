"""The rules for imports and files, checked in the syntax tree of every file.

Imports run one way: train -> stages -> rooms -> libraries. A checker takes a file's
path, counted from the repository root, and its source, and yields a sentence for every
place that breaks its rule. `BAD` proves that each can fail, `GOOD` that it need not.
"""

import ast
import pathlib
import re
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAGES = {
    "caption",
    "pretrain",
    "encode",
    "pairs",
    "finetune",
    "mix",
    "generate",
    "classify",
    "evaluate",
    "report",
}
ROOMS = {  # a room -> the rooms that it may import; every room is its own
    "augment": set(),
    "data": set(),
    "diffusion": set(),
    "metrics": {"checkpoints", "data", "models"},
    "models": set(),
    "training": set(),
    "checkpoints": {"models"},
    "mixing": {"data"},
    "pretraining": {"classification", "data", "diffusion", "models", "training"},
    "generation": {
        "checkpoints",
        "data",
        "diffusion",
        "mixing",
        "models",
        "training",
    },
    "screening": {"checkpoints", "data", "metrics", "models"},
    "classification": {
        "augment",
        "checkpoints",
        "data",
        "generation",
        "metrics",
        "models",
        "training",
    },
    "reporting": {"data", "generation", "mixing", "training"},
}
LEAVES = {
    "devices",
    "digests",
    "errors",
    "files",
    "hub",
    "imports",
    "joining",
    "object_store",
    "pictures",
    "processes",
    "scratch",
    "servers",
    "store_client",
    "store_folders",
    "work",
}
PUBLIC = {
    "__init__",
    "classifiers",
    "pipeline",
}  # for programs; nothing of ours uses it
MAY_IMPORT = {  # besides the leaves, of which files.py is one
    "train": STAGES
    | {
        "checkpoints",
        "classification",
        "command",
        "reporting",
        "stage",
        "training",
        "configs",
    },
    "stage": {*ROOMS, "stage"},
    "contract": {"artifacts", "configs"},  # stage.py and what it is made of
    # Whose arguments are checked by the declarations of fields.
    "public": {*ROOMS, "command", "train", "configs"},
    "leaf": {
        "errors",
        "files",
        "object_store",
        "scratch",
        "servers",
        "store_client",
        "store_folders",
    },
    "processes": {"errors"},  # a leaf whose errors users read
    "joining": {"errors", "hub", "processes"},
    "configs": {"configs"},
}
VAGUE = re.compile(r"(^|_)(utils?|helpers?|misc)$")
KNOW_DIFFUSERS = ("flax_classes",)
KNOW_TRANSFORMERS = ("flax_classes", "blip2")
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}

Checker = Callable[[str, str], Iterator[str]]
CHECKERS: list[Checker] = []


def checker(function: Checker) -> Checker:
    CHECKERS.append(function)
    return function


def place(path: str) -> tuple[str, str]:
    """The layer of a file and its name there: ("room", "data"), ("stage", "mix")."""
    folder, *rest = pathlib.PurePosixPath(path).with_suffix("").parts
    name = rest[0]
    if folder == "configs" or rest == ["configs"]:
        return "configs", "configs"
    if len(rest) > 1 and name == "command":
        return "train", name
    if len(rest) > 1:
        return ("room" if name in ROOMS else "unknown"), name
    if name in STAGES:
        return "stage", name
    layers = {"train": "train", "stage": "contract", "artifacts": "contract"}
    layers |= dict.fromkeys(LEAVES, "leaf")
    layers |= {"processes": "processes", "joining": "joining"}
    layers |= dict.fromkeys(PUBLIC, "public")
    return layers.get(name, "unknown"), name


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Yields (line, full dotted name, the name it is bound to) of every import.

    `from a import b` is "a.b", whether b is a module or not.
    """
    parts = pathlib.PurePosixPath(path).parts
    package = (("mvc_jax",) if parts[0] == "configs" else ()) + parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = [*above, *([node.module] if node.module else [])]
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield node.lineno, full, alias.asname or alias.name


def ours(path: str, tree: ast.AST) -> Iterator[tuple[int, str, list[str], str]]:
    """Yields (line, part of the house, what of it, bound name) of imports of ours."""
    for line, name, bound in imports(path, tree):
        top, *rest = name.split(".")
        if top == "mvc_jax" and rest:
            yield line, rest[0], rest[1:], bound


@checker
def imports_run_one_way(path: str, source: str) -> Iterator[str]:
    layer, name = place(path)
    allowed = MAY_IMPORT.get(layer, set()) | (
        LEAVES if layer not in ("leaf", "processes", "joining") else set()
    )
    if layer == "room":
        allowed |= {name} | ROOMS[name]
    known = STAGES | {*ROOMS} | LEAVES | {"command", "stage", "train", "configs"}
    for line, part, _, _ in ours(path, ast.parse(source)):
        if part in known and part not in allowed:
            yield (
                f"{path}:{line}: imports run train -> stages -> rooms -> libraries; "
                f"{layer} {name} imports mvc_jax.{part}"
            )


@checker
def every_file_has_a_place(path: str, source: str) -> Iterator[str]:
    del source
    if place(path)[0] == "unknown":
        yield (
            f"{path}:1: a file is a stage, a leaf, or in a room; if the house grows, "
            "say so in tests/test_house.py and docs/architecture.md"
        )


@checker
def modules_form_no_circle(path: str, source: str) -> Iterator[str]:
    """Within a room: between rooms, `ROOMS` is checked."""
    parts = path.removeprefix("mvc_jax/").removesuffix(".py").split("/")
    if len(parts) != 2 or parts[1] == "__init__":
        return
    room, module = parts

    def neighbours(path: str, source: str) -> Iterator[tuple[int, str]]:
        for line, part, what, _ in ours(path, ast.parse(source)):
            if part == room and what:
                yield line, what[0]

    for line, first in neighbours(path, source):
        todo, seen = [first], set()
        while todo:
            name = todo.pop()
            if name == module:
                yield f"{path}:{line}: {room}/{first}.py imports this file in turn"
                break
            file = ROOT / "mvc_jax" / room / f"{name}.py"
            if name not in seen and file.exists():
                seen.add(name)
                text = file.read_text("utf-8")
                todo += [found for _, found in neighbours(path, text)]


@checker
def libraries_stay_in_their_rooms(path: str, source: str) -> Iterator[str]:
    layer, _ = place(path)

    def only_in(names: tuple[str, ...]) -> tuple[bool, str]:
        """Of models/: flax_classes.py hides PyTorch from the libraries."""
        allowed = path in {f"mvc_jax/models/{name}.py" for name in names}
        return allowed, f"models/{{{','.join(names)}}}.py"

    allowed = {
        "diffusers": only_in(KNOW_DIFFUSERS),
        "transformers": only_in(KNOW_TRANSFORMERS),
        "ml_collections": (
            layer in {"train", "stage", "configs"},
            "train.py, stages and configs",
        ),
    }
    for line, full, _ in imports(path, ast.parse(source)):
        here, where = allowed.get(full.split(".")[0], (True, ""))
        if not here:
            yield f"{path}:{line}: {full.split('.')[0]} is imported only in {where}"


@checker
def torch_and_tensorflow_are_imported_in_functions(
    path: str, source: str
) -> Iterator[str]:
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            function.body = []
    for line, full, _ in imports(path, tree):
        if full.split(".")[0] in {"torch", "tensorflow"}:
            yield f"{path}:{line}: torch and tensorflow are imported inside functions"


@checker
def nothing_is_unpickled(path: str, source: str) -> Iterator[str]:
    rule = "nothing is loaded from a pickle"
    tree = ast.parse(source)
    torches = {"torch"}
    for line, full, bound in imports(path, tree):
        top = full.split(".")[0]
        if top in PICKLERS or full in {"torch.load", "pandas.read_pickle"}:
            yield f"{path}:{line}: {rule}: {full}"
        elif full == "torch":
            torches.add(bound)
    tensors_alone = {  # such a call runs no code of the file
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and any(ast.unparse(x) == "weights_only=True" for x in node.keywords)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in tensors_alone:
            torch_load = node.attr == "load" and ast.unparse(node.value) in torches
            if torch_load or node.attr in {"read_pickle", "to_pickle"}:
                yield f"{path}:{node.lineno}: {rule}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                off = (
                    isinstance(keyword.value, ast.Constant) and not keyword.value.value
                )
                if keyword.arg == "allow_pickle" and not off:
                    yield f"{path}:{node.lineno}: {rule}: allow_pickle"


@checker
def every_file_has_a_telling_name(path: str, source: str) -> Iterator[str]:
    del source
    for part in pathlib.PurePosixPath(path).with_suffix("").parts:
        if VAGUE.search(part):
            yield f"{path}:1: no utils, helpers or misc: the house lacks a room"


@checker
def nothing_is_unpacked_in_place(path: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Starred) and isinstance(node.value, ast.Tuple):
            yield f"{path}:{node.lineno}: write the items of *(...) by themselves"


@checker
def names_are_not_patterns(path: str, source: str) -> Iterator[str]:
    """`Path.glob` of epath takes the folder's own name for a part of the pattern."""
    if path in ("mvc_jax/data/parquet.py", "mvc_jax/data/remote.py"):  # users' patterns
        return
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr in {"glob", "rglob"}:
            yield f"{path}:{node.lineno}: files.matching() lists a folder"


def house() -> dict[str, str]:
    paths = [p for top in ("mvc_jax", "configs") for p in (ROOT / top).rglob("*.py")]
    return {p.relative_to(ROOT).as_posix(): p.read_text("utf-8") for p in sorted(paths)}


@pytest.mark.parametrize("check", CHECKERS, ids=lambda check: check.__name__)
def test_house(check):
    broken = [line for path, source in house().items() for line in check(path, source)]
    assert not broken, "\n" + "\n".join(broken)


BAD = [
    (imports_run_one_way, "mvc_jax/pairs.py", "from mvc_jax.encode import run"),
    (imports_run_one_way, "mvc_jax/pairs.py", "from mvc_jax import train"),
    (imports_run_one_way, "mvc_jax/pairs.py", "from mvc_jax.configs import common"),
    (imports_run_one_way, "mvc_jax/generate.py", "from mvc_jax import mix"),
    (imports_run_one_way, "mvc_jax/data/folder.py", "def f():\n  import mvc_jax.mix"),
    (imports_run_one_way, "mvc_jax/data/folder.py", "from .. import train"),
    (imports_run_one_way, "mvc_jax/data/folder.py", "from mvc_jax import stage"),
    (imports_run_one_way, "mvc_jax/data/__init__.py", "from ..models import resnet"),
    (imports_run_one_way, "mvc_jax/models/resnet.py", "import mvc_jax.data.order as o"),
    (imports_run_one_way, "mvc_jax/files.py", "from mvc_jax.digests import Digests"),
    (imports_run_one_way, "mvc_jax/stage.py", "from mvc_jax import pairs"),
    (imports_run_one_way, "mvc_jax/train.py", "from mvc_jax.data import order"),
    (imports_run_one_way, "configs/digits.py", "from mvc_jax import generate"),
    (
        imports_run_one_way,
        "mvc_jax/data/order.py",
        "from mvc_jax.mixing import recipes",
    ),
    (every_file_has_a_place, "mvc_jax/extras.py", ""),
    (every_file_has_a_place, "mvc_jax/attic/box.py", ""),
    (
        modules_form_no_circle,
        "mvc_jax/data/order.py",
        "from mvc_jax.data import splits",
    ),
    (libraries_stay_in_their_rooms, "mvc_jax/models/resnet.py", "import diffusers"),
    (libraries_stay_in_their_rooms, "mvc_jax/encode.py", "import diffusers.models"),
    (libraries_stay_in_their_rooms, "mvc_jax/caption.py", "from transformers import A"),
    (
        libraries_stay_in_their_rooms,
        "mvc_jax/models/clip.py",
        "def f():\n  import transformers",
    ),
    (
        libraries_stay_in_their_rooms,
        "mvc_jax/training/loop.py",
        "import ml_collections",
    ),
    (
        torch_and_tensorflow_are_imported_in_functions,
        "mvc_jax/caption.py",
        "if True:\n  import torch.nn",
    ),
    (
        torch_and_tensorflow_are_imported_in_functions,
        "mvc_jax/data/tfds.py",
        "class A:\n  import tensorflow as tf",
    ),
    (nothing_is_unpickled, "mvc_jax/files.py", "def f():\n  import pickle"),
    (nothing_is_unpickled, "mvc_jax/files.py", "np.load(path, allow_pickle=True)"),
    (nothing_is_unpickled, "mvc_jax/files.py", "np.load(path, allow_pickle=flag)"),
    (nothing_is_unpickled, "mvc_jax/models/lora.py", "import torch as t\nt.load(p)"),
    (nothing_is_unpickled, "mvc_jax/pairs.py", "torch.load(p, weights_only=False)"),
    (nothing_is_unpickled, "mvc_jax/models/lora.py", "from torch import load"),
    (nothing_is_unpickled, "configs/digits.py", "pandas.read_pickle(path)"),
    (every_file_has_a_telling_name, "mvc_jax/data/image_utils.py", ""),
    (every_file_has_a_telling_name, "mvc_jax/helpers/text.py", ""),
    (nothing_is_unpacked_in_place, "mvc_jax/mix.py", "x = (*(1, 2), 3)"),
    (names_are_not_patterns, "mvc_jax/mix.py", 'sorted(folder.glob("*.json"))'),
]


@pytest.mark.parametrize(("check", "path", "source"), BAD)
def test_a_broken_rule_is_reported_with_its_place(check, path, source):
    broken = list(check(path, source))
    assert len(broken) == 1
    assert re.match(re.escape(path) + r":\d+: \w+", broken[0])


def test_every_rule_can_fail():
    assert {check for check, _, _ in BAD} == set(CHECKERS)


def test_rooms_form_no_circle():
    done: set[str] = set()
    while ready := {room for room in {*ROOMS} - done if ROOMS[room] <= done}:
        done |= ready
    assert done == {*ROOMS}


def test_the_picture_of_the_rooms_is_that_of_the_rule():
    """docs/architecture.md has a line `room -> rooms` for each."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for room, others in ROOMS.items():
        line = f"{room:<14} -> {', '.join(sorted(others)) or '(none)'}"
        assert line in text.splitlines(), line


GOOD = {
    "mvc_jax/train.py": "from mvc_jax import mix, stage\nimport ml_collections",
    "mvc_jax/mix.py": "from mvc_jax.data import order\nrun = 1",
    "mvc_jax/generate.py": "from mvc_jax import files\nfrom mvc_jax.mixing import mix",
    "mvc_jax/report.py": "from mvc_jax.stage import open_stage\nimport mvc_jax",
    "mvc_jax/generation/image_sampler.py": "from mvc_jax.models import resnet",
    "mvc_jax/data/order.py": "from . import folder\nfrom .folder import read",
    "mvc_jax/data/tfds.py": "def f():\n  import tensorflow\nnp.load(p)",
    "mvc_jax/models/flax_classes.py": "import diffusers, transformers",
    "mvc_jax/checkpoints/hub.py": "np.load(path, allow_pickle=False)\njson.load(file)",
    "mvc_jax/configs.py": "import pathlib",
    "configs/digits.py": "from mvc_jax.configs import common\nfrom . import common",
}


@pytest.mark.parametrize("path", GOOD)
def test_a_kept_rule_is_not_reported(path):
    assert [line for check in CHECKERS for line in check(path, GOOD[path])] == []
