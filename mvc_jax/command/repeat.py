"""`mvc-jax repeat`: one run with several seeds, and what holds over all of them.

A seed draws its own split of the data, base, generator and classifiers: it is a run of
its own, in a folder of its own. With `pretrain.seed`, all have the same pool and base,
and the first run trains it. An interval over the classifiers of one split does not
know how much splits differ; one over splits does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath, epy

from mvc_jax import files, processes, stage
from mvc_jax.command import command_line, document, run_config
from mvc_jax.errors import UserError
from mvc_jax.reporting import formats
from mvc_jax.reporting.tables import Cell, Document, Table

with epy.lazy_imports():
    from mvc_jax.classification import comparisons
    from mvc_jax.reporting import split_plot

Program = Callable[[list[str]], int]  # takes a command line, returns its exit code
_HELP = """The same run with several seeds, each in a folder of its own:
    mvc-jax repeat --seeds=0,1,2 --config=configs/digits.py --workdir=runs/splits
makes runs/splits/seed-0, seed-1 and seed-2, and compares them in
runs/splits/splits.html.

  --seeds=S1,S2,...   whole numbers, each once
  --workdir=FOLDER    of all of them
  --from=FOLDER       of another repetition, from whose seeds finished stages that agree
                      are taken over
  --dry_run           prints what each seed would make

The other flags are those of a single run (`mvc-jax --help`). What was stopped is
resumed, and a seed is added, by the same command.
"""


def run(argv: Sequence[str], program: Program) -> int:
    """Runs the program once for each seed, then compares.

    Args:
      argv: the name of the program, "repeat", and its flags: `--seeds=0,1,2`,
        `--workdir=FOLDER`, and those of a single run, for all.
      program: what a single run is.

    Returns:
      the exit code of the first run that did not succeed, else 0.

    Raises:
      UserError: a flag is wrong, or the runs have different settings.
    """
    seeds, source, flags = _parse(argv[2:])
    words = [x for x in flags if not x.lstrip("-").startswith("workdir=")]
    workdir = command_line.parse([argv[0], *flags], about=_HELP).workdir
    folders = {seed: _folder(workdir, seed) for seed in seeds}
    if source is not None:
        _require_folders(source, seeds)
    for seed, folder in folders.items():
        own = [f"--workdir={folder}", f"--config.seed={seed}"]
        if source is not None:
            own.append(f"--from={_folder(source, seed)}")
        else:
            own += _base(folders, folder)
        code = program([argv[0], *_with_config(words, folder), *own])
        if code:
            return code
    if "--dry_run" in words or not processes.is_first():
        return 0
    finished = {x: f for x, f in folders.items() if stage.is_complete(f, "evaluate")}
    if len(finished) < len(folders):
        print("no comparison of the seeds: the stage evaluate was not run")
        return 0
    _require_same_settings(finished)
    summary = summarise({seed: _metrics(folder) for seed, folder in finished.items()})
    titles, accuracies = zip(
        *((row["title"], row["accuracies"]) for row in summary["rows"]), strict=True
    )
    document.write(
        workdir / "splits",
        _document(summary, _drawn(folders)),
        summary,
        picture=("test accuracy by split", split_plot.png(titles, accuracies)),
    )
    return 0


def summarise(metrics: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What holds over the splits.

    Args:
      metrics: `metrics.json` of each seed's run, all of the same settings.

    Returns:
      `seeds`; `confidence`; `rows`, accuracies by run and seed with their `mean`, as
      `evaluate` orders them; `headline`; `questions`, differences with intervals over
      splits (`over_splits`).
    """
    first, *_ = metrics.values()
    asked = [each["questions"] for each in metrics.values()]
    answers = comparisons.answers_over_splits(asked, first["confidence"])
    found = []
    for rows in zip(*(each["runs"] for each in metrics.values()), strict=True):
        accuracies = [row["accuracy"]["mean"] for row in rows]
        found.append(
            {
                "title": rows[0]["title"],
                "run": rows[0]["name"],
                "accuracies": accuracies,
                "mean": float(np.mean(accuracies)),
            }
        )
    return {
        "seeds": [*metrics],
        "confidence": first["confidence"],
        "rows": found,
        "headline": comparisons.headline(
            {row["run"]: row["mean"] for row in found},
            answers,
            where="by its mean over the splits",
        ),
        "questions": answers,
    }


def _document(summary: Mapping[str, Any], drawn: str) -> Document:
    """The headline, the accuracies and the questions.

    Args:
      summary: as `summarise` makes it.
      drawn: what each seed draws, in words.
    """
    seeds, asked = summary["seeds"], summary["questions"]
    columns = [
        Cell("test accuracy, %"),
        *(Cell(f"seed {x}", link=f"seed-{x}/report/report.html") for x in seeds),
        Cell("mean"),
    ]
    rows = [
        [
            Cell(row["title"]),
            *(Cell(formats.percent(value)) for value in row["accuracies"]),
            Cell(formats.percent(row["mean"])),
        ]
        for row in summary["rows"]
    ]
    found = [Table("Accuracy", columns, rows)]
    if asked:
        columns = document.difference_columns(
            "question", confidence=summary["confidence"], over=" over splits"
        )
        rows = [[Cell(x["question"].rstrip(":")), *_cells(x)] for x in asked]
        note = (
            "An interval is Student's, over the means of the splits; a verdict is "
            "corrected for how often its question is asked (Holm)."
        )
        found.append(Table("Questions", columns, rows, note))
    return Document(
        title=document.counted(len(seeds), "split"),
        lead=[f"{each['question']} {each['sentence']}" for each in summary["headline"]],
        notes=[f"Every seed draws its own {drawn}."],
        tables=found,
    )


def _drawn(folders: Mapping[int, epath.Path]) -> str:
    """What each seed draws, in words."""
    config = files.read_json(run_config.path_in(next(iter(folders.values()))))
    if not config["generate"]["sets"]:
        return "split and classifiers"
    if config["base"]["path"] or config["pretrain"].get("seed", -1) >= 0:
        return "split, generator and classifiers; the base is the same"
    return "split, base, generator and classifiers"


def _cells(each: Mapping[str, Any]) -> list[Cell]:
    low, high = each["low"], each["high"]
    ends = "–" if low is None else f"{formats.points(low)} to {formats.points(high)}"
    verdict = Cell(each["verdict"], is_word=True)
    return [Cell(formats.points(each["mean"])), Cell(ends), verdict]


def _metrics(folder: epath.Path) -> dict[str, Any]:
    return files.read_json(folder / "evaluate" / "metrics.json")


def _folder(workdir: epath.Path, seed: int) -> epath.Path:
    return workdir / f"seed-{seed}"


def _require_folders(source: epath.Path, seeds: Sequence[int]) -> None:
    """Checks that another repetition has these seeds.

    Raises:
      UserError: it has not.
    """
    missing = [x for x in seeds if not run_config.path_in(_folder(source, x)).exists()]
    if missing:
        raise UserError(
            f"--from={source}",
            wanted="the folder of another repetition, with the same seeds",
            got=f"none of seed {', '.join(map(str, missing))} in it",
            fix="Correct the path, or choose --seeds that it has.",
        )


def _parse(
    flags: Sequence[str],
) -> tuple[list[int], epath.Path | None, list[str]]:
    """Takes `--seeds` and `--from` out of the flags; refuses `--config.seed`.

    Raises:
      UserError: the seeds are not distinct numbers; or a flag is one of a single run.
    """
    text, source, rest = "0,1,2", None, []
    for flag in flags:
        name, _, value = flag.lstrip("-").partition("=")
        if name == "seeds":
            text = value
        elif name == "config.seed":
            raise UserError(
                f"--{name}",
                wanted="a flag of all seeds alike",
                got=flag,
                fix="Choose the seeds by --seeds=0,1,2.",
            )
        elif name in ("workdir", "from") and not value:
            raise UserError(
                f"--{name}",
                wanted=f"--{name}=FOLDER",
                got=flag,
                fix="Write it with the equals sign.",
            )
        elif name == "from":
            source = epath.Path(value).expanduser()
        else:
            rest.append(flag)
    seeds = text.split(",")
    numbers = [int(x) for x in seeds if re.fullmatch(r"\s*\d+\s*", x)]
    if len(numbers) < len(seeds) or len({*numbers}) < len(numbers):
        raise UserError(
            "--seeds",
            wanted="different whole numbers, separated by commas",
            got=repr(text),
            fix="Write e.g. --seeds=0,1,2.",
        )
    return numbers, source, rest


def _base(folders: Mapping[int, epath.Path], folder: epath.Path) -> list[str]:
    """The flag with which a later run takes over the base that all seeds share."""
    first = next(iter(folders.values()))
    if folder == first or not stage.is_complete(first, "pretrain"):
        return []
    if files.read_json(run_config.path_in(first))["pretrain"].get("seed", -1) < 0:
        return []
    return [f"--from={first}"]


def _with_config(flags: Sequence[str], folder: epath.Path) -> list[str]:
    """The flags of a seed's run: a new one starts from the config of an earlier one."""
    has_config = any(re.match("--?config(=|$)", flag) for flag in flags)
    if has_config or run_config.path_in(folder).exists():
        return [*flags]
    for other in files.matching(folder.parent, "seed-*"):
        if run_config.path_in(other).exists():
            return [f"--config={run_config.path_in(other)}", *flags]
    return [*flags]


def _require_same_settings(folders: Mapping[int, epath.Path]) -> None:
    """Checks that the runs differ in their seed alone.

    Raises:
      UserError: they do not.
    """
    configs = {x: files.read_json(run_config.path_in(f)) for x, f in folders.items()}
    (first, config), *others = configs.items()
    for seed, other in others:
        lines = stage.differences(other, config)
        lines = [x for x in lines if not x.startswith("seed:")]
        if lines:
            raise UserError(
                str(folders[seed]),
                wanted=f"the settings of {folders[first]}, but for the seed",
                got=f"others ({'; '.join(lines)})",
                fix="Pass these fields to `repeat`, or choose a new --workdir.",
            )
