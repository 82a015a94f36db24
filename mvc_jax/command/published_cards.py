"""The cards of what is published: those of the stages, with what was measured.

A stage writes its card before anything is measured, for a folder of this machine. Here
it gets the licence under which it is published, the results of `evaluate`, and names in
place of local paths.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from etils import epy

from mvc_jax.checkpoints import dataset_card, licenses, model_card
from mvc_jax.checkpoints.model_card import code
from mvc_jax.reporting import formats
from mvc_jax.reporting.tables import Cell, Table, headings

with epy.lazy_imports():
    from mvc_jax.reporting import image_metrics

_LIMITS = "## Intended use and limits\n"
_ADAPTERS = "## Load the adapters onto the base\n"
_REFERENCES = "## References\n"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is added to every card of a run.

    Attributes:
      license: under which it is published, from `licenses.choose`.
      names: what the stages' cards say -> what others understand, e.g. of a local path.
      metrics: of `evaluate`.
    """

    license: Mapping[str, Any]
    names: Mapping[str, str]
    metrics: Mapping[str, Any]


def of_set(card: str, facts: Facts, set_: str) -> str:
    """The card of a set without its folder of pictures."""
    return _extended(dataset_card.without_pictures(card), facts, set_)


def of_model(card: str, facts: Facts, datasets: Sequence[str], adapters: bool) -> str:
    """The card of the fine-tuned model.

    Args:
      card: as `finetune` wrote it.
      facts: of the run.
      datasets: names of the sets that are published with it.
      adapters: whether these are published, too, in the folder `lora`.
    """
    if adapters:
        card = card.replace("'../lora'", "'lora'")
    elif _ADAPTERS in card:
        start = card.index(_ADAPTERS)
        card = card[:start] + card[card.index(_REFERENCES) :]
    return _extended(card, facts, "", datasets)


def of_classifiers(folders: Mapping[str, Sequence[str]], facts: Facts) -> str:
    """A card of all classifiers.

    Args:
      folders: title of a run -> the folder of each of its seeds.
      facts: of the run.
    """
    lines = [
        f"- {formats.line(title)}: "
        + ", ".join(f"[{code(folder)}]({folder})" for folder in seeds)
        for title, seeds in folders.items()
    ]
    sections = [
        "# Classifiers\n\nTrained by `mvc_jax` to compare training sets. The card in "
        "each folder has the lines that load it.",
        f"Classes: {', '.join(map(code, facts.metrics['class_names']))}",
        "\n".join(lines),
        _measured(facts.metrics, ""),
        _license(facts),
        f"{_LIMITS}\n{_ABOUT_CLASSIFIERS}",
    ]
    front = {
        **facts.license,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "mvc_jax"],
    }
    return _joined(front, "\n\n".join(text.strip() for text in sections) + "\n")


def base_on_hub(card: str) -> str:
    """The name of the base on the hub, in a model's card; "": it is not from there."""
    return model_card.split(card)[0].get("base_model", "")


_ABOUT_CLASSIFIERS = """\
- They were trained to find out whether synthetic images help, at equal optimiser steps,
  not to be as accurate as possible.
- They know the classes above only, on images like those of the dataset.
- They inherit the errors and biases of the dataset, and of the model that drew the
  synthetic images. They are not for diagnosis, identification or decisions about
  people.
"""


def _extended(card: str, facts: Facts, set_: str, datasets: Sequence[str] = ()) -> str:
    """A stage's card with the licence, the results and the names of `facts`."""
    for written in sorted(facts.names, key=len, reverse=True):
        card = card.replace(written, facts.names[written])
    front, body = model_card.split(card)
    kept = {k: v for k, v in front.items() if k not in model_card.LICENSE_FIELDS}
    front = {**facts.license, **({"datasets": [*datasets]} if datasets else {}), **kept}
    named = model_card.license_name(facts.license)
    body = re.sub(
        r"(?m)^\| licence \| .* \|$",
        lambda _: model_card.table({"licence": named}).splitlines()[2],
        body,
    )
    added = f"{_measured(facts.metrics, set_)}\n{_license(facts)}\n"
    return _joined(front, body.replace(_LIMITS, f"{added}{_LIMITS}", 1))


def _license(facts: Facts) -> str:
    return f"## Licence\n\n{licenses.in_words(facts.license)}\n"


def _measured(metrics: Mapping[str, Any], set_: str) -> str:
    """What `evaluate` found, as a section.

    Args:
      metrics: as it wrote them.
      set_: whose images' metrics are shown, beside those of test images; "": none.
    """
    seeds, rows = metrics["seeds"], []
    titles = {row["name"]: row["title"] for row in metrics["runs"]}
    for row in metrics["runs"]:
        accuracy, than = row["accuracy"], row["difference"]
        spread = f"± {formats.percent(accuracy['std'])}" if seeds > 1 else ""
        cells = [Cell(formats.percent(accuracy["mean"]), spread)]
        if than is None:
            cells += [Cell(formats.NONE), Cell("", is_word=True)]
        else:
            low, high = than["low"], than["high"]
            ends = f"{formats.points(low)} to {formats.points(high)}"
            cells += [
                Cell(formats.points(than["mean"]), "" if low is None else ends),
                Cell(titles.get(than["against"], than["against"]), is_word=True),
            ]
        rows.append([Cell(row["title"]), *cells])
    columns = headings("training", "accuracy, %", "difference, points", "from")
    columns[-1] = Cell("from", is_word=True)
    spread = f"mean and standard deviation over {seeds} seeds of the classifier"
    about = (
        f"Classifiers on {metrics['counts']['test']:,} real test images; "
        f"{spread if seeds > 1 else 'one seed of the classifier'}; at most "
        f"{metrics['steps']:,} optimiser steps each; differences with their "
        f"{100 * metrics['confidence']:.0f} % intervals."
    )
    answers = [*metrics.get("headline", ()), *metrics["questions"]]
    said = [
        f"- {formats.line(x['question'])} {formats.line(x['sentence'])}"
        for x in answers
    ]
    caveats = metrics.get("caveats", {}).get("accuracy", ())
    parts = ["## Measured", about, Table("", columns, rows).markdown(), "\n".join(said)]
    parts += [" ".join(text.split()) for text in caveats]
    return "\n\n".join([*filter(None, parts), *_of_images(metrics, set_)]) + "\n"


def _of_images(metrics: Mapping[str, Any], set_: str) -> list[str]:
    """A table of the metrics of a set's images, with what is noted of them, if any."""
    table = image_metrics.table(metrics.get("images"))
    sets = [*table["sets"]] if table else []
    if set_ not in sets:
        return []
    shown = [name for name in (set_, "test") if name in sets]
    rows = [
        [
            Cell(row["title"]),
            *(Cell(formats.number(row["values"][sets.index(x)])) for x in shown),
            Cell(row["about"], is_word=True),
        ]
        for row in table["rows"]
    ]
    names = {"test": "real test images"}
    columns = [Cell("of the images"), *(Cell(names.get(x, x)) for x in shown)]
    notes = [x for x in table.get("notes", ()) if x.startswith(f"{set_}:")]
    return [Table("", [*columns, Cell("", is_word=True)], rows).markdown(), *notes]


def _joined(front: Mapping[str, Any], body: str) -> str:
    header = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n{body.lstrip()}"
