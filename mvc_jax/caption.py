"""Images -> captions, and the split that says who may see which image.

Reads: the source. Writes: `images.npy` and its rows, `splits.json`, `captions.jsonl`,
and to look at: `contact_sheet.png`, `bad_images.jsonl`, `duplicates.jsonl`. No later
stage opens the source. Test images are never captioned.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.data import captions, contents, duplicates, splits
from mvc_jax.data.attributes import attributes
from mvc_jax.data.decode import RESAMPLING, RESIZING, Decoder
from mvc_jax.data.example import Source
from mvc_jax.data.gather import Gathered, Parts, Reader, gather, write_rows
from mvc_jax.data.sources import OfClasses, check_class_names, open_source
from mvc_jax.errors import UserError, require
from mvc_jax.stage import open_stage, read_manifest
from mvc_jax.training.console import Progress

VERSION = "1"  # of the captioners in this file; raise it when their words change
CAPTIONERS = ("blip2", "flax", "file", "template", "attributes")
_USUAL_MODEL = {
    "blip2": "Salesforce/blip2-opt-2.7b",
    "flax": "ydshieh/vit-gpt2-coco-en",
}
_KEEP_SECONDS = 2.0  # of captioning that a kill may cost


def check(config: ConfigDict) -> None:
    """Checks the sections `data` and `caption`, opening the source but no image."""
    _check_fields(config.data, config.caption)
    source = _open(config.data)
    try:
        parts = _choose(source, config)(np.ones(len(source), bool))
    except UserError as error:  # the images that are missing may be bad ones
        error.details += _bad_lines(source.defects)
        raise
    _check_captioner(config.caption, source, parts)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Reads and splits the images, and captions the base pool and the training part."""
    stage = open_stage(workdir, "caption", _settings(config))
    if stage.complete:
        return
    folder = stage.folder
    if not all((folder / name).exists() for name in splits.FILES):
        try:
            _gather(config, _open(config.data), folder)
        except UserError:  # nothing is kept, so that the way out may be another setting
            stage.abandon()
            raise
    pool, train = (splits.read_split(folder, name) for name in ("pool", "train"))
    ids, labels = pool.ids + train.ids, np.concatenate([pool.labels, train.labels])
    names = [train.class_names[label] for label in labels]
    raw = _captions(config, folder, ids, names)
    collapse = config.caption.captioner in _USUAL_MODEL
    texts = [captions.clean(text, collapse=collapse) for text in raw]
    captions.write_captions(
        folder / "captions.jsonl",
        dict(zip(ids, texts, strict=True)),
        captioner=config.caption.captioner,
        version=_model(config.caption) or VERSION,
    )
    contents.warn_of_same_captions(texts[len(pool.ids) :], train)
    contents.write_contact_sheet(folder)
    for part in _kept_parts(folder):
        part.unlink()
    sizes = files.read_json(folder / "splits.json")
    counts = {name: len(ids) for name, ids in sizes.items()}
    counts["cleaned"] = sum(a != b for a, b in zip(raw, texts, strict=True))
    counts["empty"] = sum(not text for text in texts)
    artifacts = [*splits.FILES, "captions.jsonl", "contact_sheet.png"]
    stage.finish([*artifacts, "bad_images.jsonl", "duplicates.jsonl"], **counts)
    shown = ", ".join(f"{count} {name}" for name, count in counts.items())
    logging.info("%d captions; %s", len(texts), shown)
    logging.info("contact sheet: %s", folder / "contact_sheet.png")


def table(workdir: epath.Path) -> str:
    """What the stage found, as lines for a terminal."""
    counts = read_manifest(workdir, "caption")["counts"]
    return contents.table(workdir / "caption", counts)


def _settings(config: ConfigDict) -> dict[str, Any]:
    section = config.caption.to_dict() | {"version": VERSION}
    section.pop("batch_size")  # changes no caption
    if section["captioner"] == "file":  # or an edit of it would go unnoticed
        path = epath.Path(section["file"])
        section["file_sha256"] = files.sha256(path) if path.is_file() else ""
    data = config.data.to_dict()
    return {"seed": config.seed, "data": data, "caption": section}


def _check_fields(data: ConfigDict, section: ConfigDict) -> None:
    _check_choice(section.captioner, "config.caption.captioner", CAPTIONERS)
    for field, choices in (
        ("resize", RESIZING),
        ("resample", tuple(RESAMPLING)),
        ("on_bad_image", ("fail", "skip")),
        ("duplicates", ("keep", "remove")),
    ):
        _check_choice(data[field], f"config.data.{field}", choices)
    for where, field in (
        *((data, field) for field in ("size", "max_pixels")),
        *((section, x) for x in ("max_new_tokens", "num_beams", "batch_size")),
    ):
        require(
            where[field] >= 1,
            f"config.{'data' if where is data else 'caption'}.{field}",
            wanted="at least 1",
            got=where[field],
            fix="Raise it.",
        )
    _shares(data).check()
    _decoder(data)
    known = ("caption", "class_type", "label")
    captions.check_template(data.prompt, "config.data.prompt", known)
    if section.captioner == "template":
        name = "config.caption.template"
        captions.check_template(section.template, name, known[1:])


def _check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    require(
        value in choices,
        name,
        wanted=f"one of {', '.join(choices)}",
        got=repr(value),
        fix="Name one of these.",
    )


def _check_captioner(section: ConfigDict, source: Source, parts: Parts) -> None:
    """What a captioner needs, as far as it shows before it is loaded."""
    if section.captioner == "file":
        wanted = np.concatenate([parts["pool"], parts["train"]])
        known = {*source.ids, *source.defects}
        captions.read_own(section.file, [source.ids[i] for i in wanted], known)
    elif section.captioner in _USUAL_MODEL:
        network = _network(section.captioner)
        _check_choice(section.dtype, "config.caption.dtype", network.DTYPES)
        network.check_model(_model(section))


def _model(section: ConfigDict) -> str:
    return section.model or _USUAL_MODEL.get(section.captioner, "")


def _open(data: ConfigDict) -> Source:
    source = open_source(
        data.source,
        _decoder(data),
        image_column=data.image_column,
        label_column=data.label_column,
        data_dir=data.dir,
    )
    if data.classes:
        source = OfClasses(source, data.classes)
    check_class_names(source.class_names)
    return source


def _decoder(data: ConfigDict) -> Decoder:
    """The decoder of `data.window` ("image" or "LOW,HIGH") and `data.max_pixels`."""
    window = None
    if data.window != "image":
        try:
            low, high = (float(number) for number in data.window.split(","))
            window = (low, high) if low < high else None
        except ValueError:
            pass
        require(
            window is not None,
            "config.data.window",
            wanted='"image" or two numbers, the lower one first',
            got=repr(data.window),
            fix="Write e.g. --config.data.window=0,4095 for 12 bits.",
        )
    return Decoder(max_pixels=data.max_pixels, window=window)


def _shares(data: ConfigDict) -> splits.Shares:
    return splits.Shares(
        pool=data.pool,
        per_class=data.per_class,
        fraction=data.fraction,
        test=data.test_fraction,
    )


def _choose(source: Source, config: ConfigDict) -> Callable[[np.ndarray], Parts]:
    """usable [N] -> the split, as `make_splits` cuts it."""
    return lambda usable: splits.make_splits(
        source.labels,
        source.class_names,
        _shares(config.data),
        seed=config.seed,
        is_test=source.is_test,
        usable=usable,
    )


def _gather(config: ConfigDict, source: Source, folder: epath.Path) -> None:
    """Writes the images and their rows, or raises with every bad image listed."""
    data = config.data
    choose = _choose(source, config)
    total = sum(map(len, choose(np.ones(len(source), bool)).values()))
    progress = Progress("images", total, unit="image")
    bad: dict[str, str] = {}
    copies: list[dict[str, str]] = []

    def on_bad(found: dict[int, str]) -> None:
        bad.update(source.defects | {source.ids[i]: found[i] for i in found})
        _judge_bad_images(bad, folder / "bad_images.jsonl", data.on_bad_image)

    def keep(gathered: Gathered) -> Parts:
        copies[:] = _copies(source, gathered)
        files.write_jsonl(folder / "duplicates.jsonl", copies)
        return _without_copies(source, gathered.parts, copies, data.duplicates)

    gathered = gather(
        source,
        folder / "images.npy",
        choose,
        Reader(data.size, data.resize, data.resample, data.max_pixels),
        on_bad=on_bad,
        keep=keep,
        on_image=lambda: progress.advance(1),
    )
    progress.close()
    train = gathered.parts["train"]
    contents.warn_of_classes(source.class_names, source.labels[train])
    facts = {"name": data.source, "remarks": source.remarks}
    write_rows(folder, source, gathered, **facts, duplicates=data.duplicates)


def _judge_bad_images(bad: dict[str, str], path: epath.Path, on_bad: str) -> None:
    rows = [{"image": name, "reason": reason} for name, reason in bad.items()]
    files.write_jsonl(path, rows)
    if bad and on_bad == "fail":
        raise UserError(
            "config.data.source",
            wanted="images that can all be used",
            got=f"{len(bad)} that cannot",
            fix=f"Mend or remove them, or go on without them by "
            f"--config.data.on_bad_image=skip. The list is in {path}.",
            details=_bad_lines(bad),
        )
    if bad:
        logging.warning("%d bad images are left out; they are in %s", len(bad), path)


def _bad_lines(bad: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}: {reason}" for name, reason in bad.items())


def _copies(source: Source, gathered: Gathered) -> list[dict[str, str]]:
    """Rows for the training images that are in test as well."""
    train, test = (gathered.parts[name].tolist() for name in ("train", "test"))
    prints = ([gathered.found[i].fingerprint for i in part] for part in (train, test))
    return [
        {"train": source.ids[train[i]], "test": source.ids[test[j]]}
        for i, j in duplicates.find(*prints)
    ]


def _without_copies(
    source: Source, parts: Parts, copies: list[dict[str, str]], policy: str
) -> Parts:
    if not copies or policy == "keep":
        if copies:
            logging.warning(
                "%d training images are in test as well (duplicates.jsonl); "
                "--config.data.duplicates=remove takes them out of train",
                len(copies),
            )
        return parts
    gone = {row["train"] for row in copies}
    train = np.asarray([i for i in parts["train"] if source.ids[i] not in gone], int)
    counts = np.bincount(source.labels[train], minlength=len(source.class_names))
    require(
        bool(counts.min() > 0),
        "config.data.duplicates",
        wanted="at least one training image in each class that is not in test as well",
        got=f"none in class {source.class_names[counts.argmin()]!r}",
        fix="Mend the dataset's split, or keep them with duplicates=keep.",
    )
    logging.warning("%d training images are in test as well; removed", len(copies))
    return parts | {"train": train}


def _captions(
    config: ConfigDict, folder: epath.Path, ids: Sequence[str], names: Sequence[str]
) -> list[str]:
    """The captions of the first images of `images.npy`, as their captioner says them.

    Args:
      config: of the run.
      folder: of the stage.
      ids: of these images.
      names: of their classes.
    """
    section = config.caption
    if section.captioner == "file":
        return captions.read_captions(section.file, ids)
    if section.captioner == "template":
        values = {"class_type": config.data.class_type}
        texts = (section.template.format(label=name, **values) for name in names)
        return [captions.readable(text) for text in texts]
    images = files.map_array(folder / "images.npy")[: len(ids)]
    if section.captioner == "attributes":
        return attributes(images)
    kept = {}
    for part in _kept_parts(folder):
        kept |= {row["id"]: row["caption"] for row in files.read_jsonl(part)}
    rows = [i for i, id_ in enumerate(ids) if id_ not in kept]
    progress = Progress("captions", len(ids), done=len(kept), unit="image")
    fresh, spoke = [], time.monotonic()
    for row, text in _machine_captions(section, folder, images, rows):
        fresh.append({"id": ids[row], "caption": text})
        progress.advance(1)
        if time.monotonic() - spoke > _KEEP_SECONDS or len(kept) + len(fresh) == len(
            ids
        ):
            name = f"{len(kept):08d}.jsonl"
            files.write_jsonl(folder / "captions.partial" / name, fresh)
            kept |= {row["id"]: row["caption"] for row in fresh}
            fresh, spoke = [], time.monotonic()
    progress.close()
    return [kept[id_] for id_ in ids]


def _machine_captions(
    section: ConfigDict, folder: epath.Path, images: np.ndarray, rows: list[int]
) -> Iterator[tuple[int, str]]:
    """Yields (row, caption) of `rows` of the images, from a network."""
    if not rows:
        return
    network = _network(section.captioner)
    options = {
        "model": _model(section),
        "batch_size": section.batch_size,
        "dtype": section.dtype,
        "max_new_tokens": section.max_new_tokens,
        "num_beams": section.num_beams,
    }
    if section.captioner == "blip2":  # another process, which maps the file itself
        path = folder / "images.npy"
        yield from network.captions(path, rows, prompt=section.instruction, **options)
    else:
        yield from network.captions(images, rows, **options)


def _network(captioner: str) -> ModuleType:
    if captioner == "blip2":
        from mvc_jax.checkpoints import blip2_captioner as network
    else:
        from mvc_jax.checkpoints import vit_gpt2_captioner as network
    return network


def _kept_parts(folder: epath.Path) -> list[epath.Path]:
    """Files of captions that were made before a run was cut."""
    return sorted((folder / "captions.partial").glob("*.jsonl"))
