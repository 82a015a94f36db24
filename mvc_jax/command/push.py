"""`mvc-jax push`: a finished run's set, model and classifiers to the Hugging Face hub.

Everything that can be refused is refused before anything is written; how a repository
gets all of its files or none is in `checkpoints/hub_upload.py`.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import __version__, files, object_store, stage
from mvc_jax.checkpoints import licenses, model_card
from mvc_jax.command import (
    document,
    finished,
    published_cards,
    run_folder,
)
from mvc_jax.errors import UserError
from mvc_jax.reporting import formats

with epy.lazy_imports():
    from mvc_jax.checkpoints import hub_upload
    from mvc_jax.classification import runs

_HELP = """Publishes a finished run on the Hugging Face hub:
    mvc-jax push --to=digits-mvc --workdir=runs/digits --license=cc-by-4.0 --dry_run
makes the data set OWNER/digits-mvc of the run's synthetic images and the model
OWNER/digits-mvc of its fine-tuned Stable Diffusion, with cards that name the base, the
licence, the results and the limits. The token is that of `hf auth login` or HF_TOKEN.

  --to=NAME         or OWNER/NAME, of an organisation
  --workdir=FOLDER  of the run
  --what=LIST       of dataset, model, classifiers (as NAME-classifiers); by default
                    dataset,model
  --set=LIST        of the run's sets; by default mixed. Several become NAME-SET each
  --license=NAME    where the base has none that is known, e.g. one made by the run
  --with_real       of a set that also has the real images: publishes these, too
  --private         only for you or the organisation
  --update          replaces what an earlier push has published by this name
  --dry_run         prints files, sizes, licence and cards; asks the hub nothing

A repository gets all of its files in one commit, or is not made. The folders of
pictures of a set are left out: the Parquet files have the same images.
"""
_WHAT = {"dataset": "generate", "model": "finetune", "classifiers": "classify"}
_TEXTS = ("to", "workdir", "what", "set", "license")
_SWITCHES = ("with_real", "private", "update", "dry_run")
_NAME = re.compile(r"([\w.-]+/)?\w[\w.-]*", re.ASCII)
_MADE_BY = "mvc_jax.json"


@dataclasses.dataclass(frozen=True)
class _Flags:
    """The flags; see the help."""

    to: str
    workdir: epath.Path
    what: tuple[str, ...]
    sets: tuple[str, ...]
    license: str
    with_real: bool = False
    private: bool = False
    update: bool = False
    dry_run: bool = False


def run(argv: Sequence[str]) -> None:
    """Publishes a run, or prints what would be.

    Args:
      argv: the name of the program, "push", and its flags.

    Raises:
      UserError: a flag is wrong, the run is unfinished or may not be published, the hub
        refuses it, or the upload failed: then nothing is published.
    """
    flags = _parse(argv[2:])
    with run_folder.locked(flags.workdir if flags.workdir.is_dir() else None, "from"):
        names = dict.fromkeys(["evaluate", *(_WHAT[each] for each in flags.what)])
        config = finished.require(flags.workdir, [*names])
        _check_sets(flags, config)
        if flags.dry_run:
            _show([*_repositories(flags, config, flags.to)])
            return
        to = _with_owner(flags.to, hub_upload.owners())
        repositories = [*_repositories(flags, config, to)]
        found = [
            hub_upload.look(each, update=flags.update, private=flags.private)
            for each in repositories
        ]
        said = hub_upload.publish(
            repositories,
            found,
            message=f"Published by mvc_jax {__version__}",
            private=flags.private,
        )
    print("published", *said, sep="\n")


def _parse(words: Sequence[str]) -> _Flags:
    """The flags.

    Raises:
      UserError: one is unknown, missing or wrong.
      SystemExit: --help was given.
    """
    texts, switches, rest = {}, set(), iter(words)
    for word in rest:
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("-"):
            name = ""
        if name in ("help", "h"):
            print(_HELP)
            raise SystemExit(0)
        if name in _TEXTS:
            texts[name] = value if equals else next(rest, "")
        elif name in _SWITCHES and not equals:
            switches.add(name)
        else:
            raise UserError(
                "command line",
                wanted="flags of `mvc-jax push`",
                got=word,
                fix="Leave it out; `mvc-jax push --help` lists all.",
            )
    for name, example in (("to", "digits-mvc"), ("workdir", "runs/digits")):
        if not texts.get(name):
            raise UserError(
                f"--{name}",
                wanted="the name to publish by" if name == "to" else "a finished run",
                got="none",
                fix=f"Add e.g. --{name}={example}.",
            )
    if not _NAME.fullmatch(texts["to"]) or re.search(r"--|\.\.|\.git$", texts["to"]):
        raise UserError(
            f"--to={texts['to']}",
            wanted="NAME or OWNER/NAME, of letters, digits, `-`, `_` and `.`",
            got="another",
            fix="Write e.g. --to=digits-mvc.",
        )
    what = _listed(texts.get("what", "dataset,model"))
    if not what or {*what} - {*_WHAT}:
        raise UserError(
            "--what",
            wanted=f"some of {', '.join(_WHAT)}",
            got=repr(texts["what"]),
            fix="Write e.g. --what=dataset,model.",
        )
    workdir = epath.Path(texts["workdir"]).expanduser()
    if object_store.is_remote(workdir):
        raise UserError(
            f"--workdir={workdir}",
            wanted="a folder of this machine",
            got="a bucket",
            fix="Copy it to a local folder, and publish that.",
        )
    return _Flags(
        texts["to"],
        workdir,
        what,
        _listed(texts.get("set", "mixed")),
        texts.get("license", ""),
        **{name: name in switches for name in _SWITCHES},
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(x.strip() for x in text.split(",") if x.strip()))


def _check_sets(flags: _Flags, config: ConfigDict) -> None:
    """Checks that the sets are there, and what is in them.

    Raises:
      UserError: one is not, or has real images that were not asked for.
    """
    if "dataset" not in flags.what:
        return
    there = config.generate.sets
    if not flags.sets or {*flags.sets} - {*there}:
        raise UserError(
            f"--set={','.join(flags.sets)}",
            wanted=f"some of the run's sets, {', '.join(there)}",
            got="others",
            fix=f"Write e.g. --set={there[0]}.",
        )
    for set_ in flags.sets:
        real = [x for x in _of_set(flags.workdir, set_) if x.startswith("data/real-")]
        if real and not flags.with_real:
            raise UserError(
                str(flags.workdir / "generate" / set_),
                wanted="synthetic images alone",
                got=f"your real images, too ({', '.join(real[:3])})",
                fix="If these may be published, add --with_real; else draw the set "
                "with --config.generate.include_real=False in a new workdir.",
            )


def _with_owner(name: str, owners: Sequence[str]) -> str:
    """The full name.

    Raises:
      UserError: its owner is none of those that may be written to.
    """
    if "/" not in name:
        return f"{owners[0]}/{name}"
    owner = name.partition("/")[0]
    if owner not in owners:
        raise UserError(
            f"--to={name}",
            wanted=f"a name of {' or '.join(owners)}, to which the token may write",
            got=f"one of {owner}",
            fix=f"Write e.g. --to={owners[0]}/{name.partition('/')[2]}, or use another "
            "token.",
        )
    return name


def _repositories(
    flags: _Flags, config: ConfigDict, to: str
) -> Iterator["hub_upload.Repository"]:
    """What is to be published, in full.

    Raises:
      UserError: the licence of the base forbids it, or is not known.
    """
    workdir = flags.workdir
    model = workdir / "finetune" / "model"
    card, made_by = _card(model), files.read_record(model / _MADE_BY)
    base = made_by.get("base", "")
    facts = _facts(flags, config, model, base)
    datasets = []
    for set_ in flags.sets if "dataset" in flags.what else ():
        name = f"{to}-{set_}" if len(flags.sets) > 1 else to
        datasets.append(name)
        folder = workdir / "generate" / set_
        own = _card(folder)
        content = {path: folder / path for path in _of_set(workdir, set_)}
        content[model_card.FILE] = published_cards.of_set(own, facts, set_).encode()
        yield hub_upload.Repository(name, "dataset", content)
    if "model" in flags.what:
        content = _files(workdir, "finetune", "model/")
        if made_by:
            public = {name: facts.names.get(x, x) for name, x in made_by.items()}
            content[_MADE_BY] = f"{json.dumps(public, indent=1)}\n".encode()
        on_hub = published_cards.base_on_hub(card)
        adapters = _files(workdir, "finetune", "lora/") if on_hub else {}
        content |= {f"lora/{path}": file for path, file in adapters.items()}
        text = published_cards.of_model(card, facts, datasets, adapters=bool(adapters))
        content[model_card.FILE] = text.encode()
        yield hub_upload.Repository(to, "model", content)
    if "classifiers" in flags.what:
        content, folders = {}, {}
        for path, weights in _files(workdir, "classify", "models/").items():
            folder = path.rpartition("/")[0]
            folders.setdefault(folder.partition("/")[0], []).append(folder)
            beside = files.matching(weights.parent, "*")  # its config and card
            content |= {f"{folder}/{file.name}": file for file in beside}
        titles = {
            runs.parse(row["name"]).slug: row["title"] for row in facts.metrics["runs"]
        }
        named = {titles.get(run, run): seeds for run, seeds in folders.items()}
        text = published_cards.of_classifiers(named, facts)
        content[model_card.FILE] = text.encode()
        yield hub_upload.Repository(f"{to}-classifiers", "model", content)


def _facts(
    flags: _Flags, config: ConfigDict, model: epath.Path, base: str
) -> published_cards.Facts:
    """What is added to every card.

    Args:
      flags: of the command.
      config: of the run.
      model: the folder of the fine-tuned model.
      base: what its card calls the base.
    """
    names = {}
    if not published_cards.base_on_hub(_card(model)):
        folder = epath.Path(config.base.path).name
        local = f"a local folder, {folder}" if folder else "made by the stage pretrain"
        names = {x: local for x in (base, config.base.path) if x}
    kind, _, path = config.data.source.partition(":")
    if path and kind != "tfds" and "://" not in path:
        names[config.data.source] = epath.Path(path).name
    return published_cards.Facts(
        license=licenses.choose(model_card.base_license(model), flags.license),
        names=names,
        metrics=files.read_json(flags.workdir / "evaluate" / "metrics.json"),
    )


def _card(folder: epath.Path) -> str:
    """The card of a stage's folder.

    Raises:
      UserError: an early version made it, without one.
    """
    path = folder / model_card.FILE
    if not path.exists():
        raise UserError(
            str(path),
            wanted="the card of what is published",
            got="no such file",
            fix="An early version has made this: make it again in a new workdir.",
        )
    return path.read_text()


def _of_set(workdir: epath.Path, set_: str) -> list[str]:
    """The files of a set that are published, by their paths in it."""
    return [
        path
        for path in _files(workdir, "generate", f"{set_}/")
        if not path.startswith("train/")
    ]


def _files(workdir: epath.Path, name: str, prefix: str) -> dict[str, epath.Path]:
    """The files that a stage wrote into a folder, by their paths in that."""
    return {
        path.removeprefix(prefix): workdir / name / path
        for path in stage.read_manifest(workdir, name)["artifacts"]
        if path.startswith(prefix)
    }


def _show(repositories: Sequence["hub_upload.Repository"]) -> None:
    """Prints what would be published."""
    for each in repositories:
        sizes = {
            path: len(x) if isinstance(x, bytes) else x.stat().length
            for path, x in each.content.items()
        }
        card = each.content[model_card.FILE].decode()
        license_ = model_card.license_name(model_card.split(card)[0])
        count = document.counted(len(sizes), "file")
        print(
            f"{each.kind} {each.name}: {count}, {formats.size(sum(sizes.values()))}, "
            f"licence {license_}"
        )
        width = max(len(name) for name in _groups(sizes))
        for name, size in _groups(sizes).items():
            print(f"  {name:{width}}  {formats.size(size)}")
        print(f"  {model_card.FILE}:")
        print(*(f"    {line}".rstrip() for line in card.splitlines()), "", sep="\n")
    print("nothing was published, and the hub was not asked")


def _groups(sizes: Mapping[str, int]) -> dict[str, int]:
    """Files with their sizes; more than three alike in one row."""
    alike = {path: re.sub(r"\d+", "*", path) for path in sizes}
    counts, found = Counter(alike.values()), Counter()
    for path, size in sizes.items():
        count = counts[alike[path]]
        name = f"{alike[path]} ({count} files)" if count > 3 else path
        found[name] += size
    return dict(found)
