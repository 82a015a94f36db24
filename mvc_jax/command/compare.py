"""`mvc-jax compare`: finished workdirs side by side.

Which settings differ, how accurate each run is, and paired differences where the test
images are the same.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax.command import document, finished, run_config, run_folder
from mvc_jax.configs import common, fields
from mvc_jax.errors import UserError
from mvc_jax.reporting import tables
from mvc_jax.reporting.tables import Cell, Table

with epy.lazy_imports():
    from mvc_jax.classification import comparisons, runs, tested

_HELP = """Finished workdirs side by side; the first is the one to compare with:
    mvc-jax compare runs/digits runs/fine runs/coarse
prints and writes compare.md, compare.html and compare.json: the settings that differ,
accuracies with intervals, and paired differences where the test images are the same.

  --out=FOLDER   of the files; by default the current one
"""
_WORDS = {"yes": "higher", "no": "lower"}


@dataclasses.dataclass(frozen=True)
class _Member:
    """A workdir that is compared.

    Attributes:
      name: by which it is shown.
      config: the last one it was worked on with.
      results: of its classifiers.
      other_images: how its test images differ from the first one's; "": not at all.
    """

    name: str
    config: ConfigDict
    results: "tested.Tested"
    other_images: str = ""


def run(argv: Sequence[str]) -> None:
    """Compares workdirs; prints and writes what was found.

    Args:
      argv: the name of the program, "compare", workdirs, and `--out`.

    Raises:
      UserError: a flag is wrong; a workdir has no finished classifiers; or they tell
        other classes apart.
    """
    folders, out = _parse(argv[2:])
    members = _read(folders)
    confidence = members[0].config.evaluate.confidence
    summary = summarise(members, confidence)
    run_folder.check(out, 0.0)
    document.write(out / "compare", _document(members, summary), summary)


def _parse(words: Sequence[str]) -> tuple[list[epath.Path], epath.Path]:
    """The workdirs and the folder to write to.

    Raises:
      UserError: a flag is unknown, or there are fewer than two workdirs, or one twice.
      SystemExit: --help was given.
    """
    folders, out, rest = [], ".", iter(words)
    for word in rest:
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            folders.append(epath.Path(word).expanduser())
        elif name in ("help", "h"):
            print(_HELP)
            raise SystemExit(0)
        elif name == "out":
            out = value if equals else next(rest, "")
        else:
            raise UserError(
                "command line",
                wanted="workdirs, and perhaps --out=FOLDER",
                got=word,
                fix="Leave it out; `mvc-jax compare --help` says more.",
            )
    known = [folder.resolve() for folder in folders]
    if len(folders) < 2 or len({*known}) < len(known) or not out:
        raise UserError(
            "mvc-jax compare",
            wanted="two or more workdirs, each once",
            got=" ".join(map(str, folders)) or "none",
            fix="Write e.g. mvc-jax compare runs/digits runs/fine.",
        )
    return folders, epath.Path(out).expanduser()


def _read(folders: Sequence[epath.Path]) -> list[_Member]:
    """The workdirs, of which the first has what others are compared with.

    Raises:
      UserError: one cannot be compared.
    """
    short = {folder.name for folder in folders}
    has_names = len(short) == len(folders) and "" not in short
    members: list[_Member] = []
    for folder in folders:
        name = folder.name if has_names else str(folder)
        config = finished.require(folder, ["classify"])
        results, other = document.read(folder), ""
        if members:
            first = members[0]
            _require_classes(folder, results, folders[0], first.results)
            same_source = config.data.source == first.config.data.source
            other = results.difference_of_images(first.results, same_source)
        members.append(_Member(name, config, results, other))
    return members


def _require_classes(
    folder: epath.Path,
    results: "tested.Tested",
    first: epath.Path,
    others: "tested.Tested",
) -> None:
    """Checks that two workdirs tell the same classes apart, in whatever order.

    Raises:
      UserError: they do not.
    """
    ours, theirs = ({*each.class_names} for each in (results, others))
    if ours == theirs:
        return
    counts = f"{len(ours)} classes against {len(theirs)}"
    if len(ours) == len(theirs):
        counts = "other classes"
    own, missing = sorted(ours - theirs), sorted(theirs - ours)
    said = [f"{own[0]!r} is only in it"] if own else []
    said += [f"{missing[0]!r} is only in {first}"] if missing else []
    raise UserError(
        str(folder),
        wanted=f"the classes of {first}",
        got=f"{counts}: {', and '.join(said)}",
        fix="Compare runs of one dataset: accuracies of others say nothing about each "
        "other.",
    )


def summarise(members: Sequence[_Member], confidence: float) -> dict[str, Any]:
    """All numbers of a comparison, as JSON.

    Returns:
      `workdirs`; `fields`: of each that differs its values; `confidence`; `runs`: of
      each the accuracy in every workdir that has it (`comparisons.accuracy`);
      `other_test_images`: workdir -> how they differ from the first one's;
      `differences` from the first, as `comparisons.compared` describes them, and
      `same`: pairs of a run and a workdir with the first one's predictions.
    """
    names = [*dict.fromkeys(run for m in members for run in m.results.correct)]
    first, *others = members
    about, pairs, same = [], [], []
    for run in names:
        for member in others:
            ours, theirs = (m.results.correct.get(run) for m in (member, first))
            if ours is None or theirs is None or member.other_images:
                continue
            seeds = min(len(ours), len(theirs))
            if (ours[:seeds] == theirs[:seeds]).all():
                same.append({"run": run, "workdir": member.name})
                continue
            about.append({"run": run, "workdir": member.name, "against": first.name})
            pairs.append((ours, theirs))
    answered = comparisons.compared(pairs, confidence)
    return {
        "workdirs": [member.name for member in members],
        "confidence": confidence,
        "fields": _fields([member.config for member in members]),
        "runs": {
            run: {
                member.name: comparisons.accuracy(
                    member.results.correct[run], confidence
                )
                for member in members
                if run in member.results.correct
            }
            for run in names
        },
        "test_images": {member.name: len(member.results.ids) for member in members},
        "other_test_images": {m.name: m.other_images for m in others if m.other_images},
        "differences": [x | y for x, y in zip(about, answered, strict=True)],
        "same": same,
    }


def _fields(configs: Sequence[ConfigDict]) -> dict[str, list[Any]]:
    """Field -> its value in every config, of those in which they differ."""
    found = {}
    for name in common.FIELDS.flat():
        if name in run_config.OF_A_COMMAND:
            continue
        values = [run_config.value(config, name) for config in configs]
        if any(value != values[0] for value in values):
            found[name] = values
    return found


def _document(members: Sequence[_Member], summary: dict[str, Any]) -> tables.Document:
    names = summary["workdirs"]
    heads = [Cell(name) for name in names]
    made = []
    if summary["fields"]:
        rows = [
            [Cell(field), *(Cell(_shown(value), is_word=True) for value in values)]
            for field, values in summary["fields"].items()
        ]
        words = [Cell(name, is_word=True) for name in names]
        made.append(Table("Settings that differ", [Cell("field"), *words], rows))
    rows = [
        [
            Cell(runs.parse(run).title),
            *(document.accuracy_cell(found.get(name)) for name in names),
        ]
        for run, found in summary["runs"].items()
    ]
    unit = f"Test accuracy in percent, with its {summary['confidence']:.0%} interval."
    made.append(Table("Accuracy", [Cell("training"), *heads], rows, unit))
    if summary["differences"]:
        rows = [
            (runs.parse(each["run"]).title, each["workdir"], each)
            for each in summary["differences"]
        ]
        table = document.difference_table(
            f"Differences from {names[0]}",
            f"The accuracy in a workdir minus that in {names[0]}, seed by seed on the "
            "same test images.",
            rows,
            place="in",
            words=_WORDS,
            confidence=summary["confidence"],
        )
        made.append(table)
    title = f"{', '.join(names[1:])} compared with {names[0]}"
    return tables.Document(title, _lead(members, summary), _notes(summary), made)


def _lead(members: Sequence[_Member], summary: dict[str, Any]) -> list[str]:
    first, asked, lead = members[0].name, summary["differences"], []
    clear = [each for each in asked if each["verdict"] != "unclear"]
    corrected = f", corrected for asking {len(asked)} times" if len(asked) > 1 else ""
    for each in clear:
        word = _WORDS[each["verdict"]]
        lead.append(
            f"{runs.parse(each['run']).title} is {word} in {each['workdir']} than in "
            f"{first}: {document.points(each)}{corrected}."
        )
    if asked and not clear:
        lead.append(
            f"No difference from {first} is seen in "
            f"{document.counted(len(asked), 'comparison')}{corrected}."
        )
    if summary["same"]:
        same = document.counted(len(summary["same"]), "run")
        lead.append(f"{same} made the same predictions as in {first}.")
    for name, why in summary["other_test_images"].items():
        lead.append(
            f"{name} was tested on other images than {first} ({why}), so there are no "
            "paired differences: only their intervals can be compared."
        )
    if not summary["fields"]:
        lead.append("All settings are the same.")
    return lead


def _notes(summary: dict[str, Any]) -> list[str]:
    images = {*summary["test_images"].values()}
    shown = " to ".join(map(str, sorted({min(images), max(images)})))
    once = runs.drawn_once(map(runs.parse, summary["runs"]))
    return [
        f"An interval ({summary['confidence']:.0%}) is for other seeds of the "
        f"classifiers and other test images ({shown} here), of {once} in each "
        "workdir: `mvc-jax repeat` shows how much another split changes.",
        "A verdict is corrected for how often its question is asked (Holm); an "
        "interval is of each difference by itself. Where one workdir has more seeds, "
        "differences are of those that both have.",
    ]


def _shown(value: Any) -> str:
    return fields.as_flag(value) or "(empty)"
