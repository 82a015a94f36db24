"""Images -> captions; also decides which split each image belongs to.

Reads: the source. Writes: `images.npy` and its rows, `splits.json`, `captions.jsonl`,
and for the user `contact_sheet.png`, `bad_images.jsonl` and `duplicates.jsonl`. The
same of `pretrain.source`, where there is one, into `pool/`. No later stage opens a
source. Test images are never captioned.

Of many processes the first reads the images and writes all files; where a network
writes the captions, each captions some of the batches.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int
from ml_collections import ConfigDict

from mvc_jax import files, processes
from mvc_jax.classification import duration
from mvc_jax.data import base_pool, captions, duplicates, sources, splits, summary
from mvc_jax.data.attribute_captions import attribute_captions
from mvc_jax.data.class_folders import class_folders
from mvc_jax.data.decode import Decoder
from mvc_jax.data.example import Source
from mvc_jax.data.folder import FolderOptions
from mvc_jax.data.gather import (
    Gathered,
    ReaderOptions,
    SplitIndices,
    gather,
    write_rows,
)
from mvc_jax.data.sources import (
    ClassSubset,
    check_class_names,
    folders_of,
    group_names,
    open_source,
    validation_of,
)
from mvc_jax.errors import UserError, require_one_of
from mvc_jax.screening.settings import FilterSettings
from mvc_jax.stage import Spec, Stage, open_stage, read_manifest
from mvc_jax.training import runtime
from mvc_jax.training.console import Progress
from mvc_jax.work import Sizes, Work

VERSION = "1"  # of the captioners in this file; raise it when their output changes
_DEFAULT_MODEL = {
    "blip2": "Salesforce/blip2-opt-2.7b",
    "flax": "ydshieh/vit-gpt2-coco-en",
}
_NETWORK_SIDE = 224  # pixels, as the captioners see an image
_SAVE_SECONDS = 2.0  # of captioning that a kill may cost


def require_outside(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Refuses a workdir inside of a source, before either is touched."""
    sources.require_outside(config.data.source, str(workdir))
    if _has_pool(config):
        sources.require_outside(config.pretrain.source, str(workdir))


def check(config: ConfigDict) -> None:
    """Checks `data` and `caption`, and what else depends on classes and images.

    Opens the source, but decodes no image.
    """
    _check_fields(config.data, config.caption)
    source = _open(config.data)
    try:
        chosen = _splitter(source, config)(np.ones(len(source), bool))
    except UserError as error:  # the missing images may be bad ones
        error.details += _bad_lines(source.defects)
        raise
    _require_classes(config, source)
    _check_captioner(config.caption, source, chosen)
    if _has_pool(config):
        pool = _open_pool(config)
        chosen = _choose_pool(config, pool)
        _check_captioner(_pool_captions(config), pool, chosen)
    FilterSettings(**config.generate.filter).require_top(len(source.class_names))
    duration.check_warmup(config.classify.to_dict(), source.labels[chosen["train"]])


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Reads and splits the images; captions the base pool and the training images."""
    stage = open_stage(workdir, stage_spec(config))
    if stage.complete:
        return
    processes.on_first(
        "the images", lambda: _gather_once(config, stage), processes.WORK_SECONDS
    )
    own_pool = config.pretrain.seed >= 0 and config.data.pool > 0
    class_type = config.data.class_type
    parts = [Captioned(stage.folder, config.caption, class_type, own_pool)]
    if _has_pool(config):
        folder = stage.folder / base_pool.FOLDER
        class_type = config.pretrain.pool.class_type
        parts.append(Captioned(folder, _pool_captions(config), class_type))
    for part in parts:
        if part.section.captioner in _DEFAULT_MODEL:
            _network_captions(part, stage)
    counts = processes.on_first("the captions", lambda: _write(config, stage, parts))
    written = [*splits.FILES, "captions.jsonl", "bad_images.jsonl", "duplicates.jsonl"]
    artifacts = [*written, "contact_sheet.png", "label_conflicts.jsonl"]
    if _has_pool(config):
        artifacts += [f"{base_pool.FOLDER}/{name}" for name in written]
    stage.finish(artifacts, **counts)


@dataclasses.dataclass(frozen=True)
class Captioned:
    """A folder of images, and how they are captioned.

    Attributes:
      folder: with the files of `data/splits.py`.
      section: `config.caption`, or what of it holds for these images.
      class_type: of the images.
      relative_to_pool: whether attributes are relative to those of the pool alone.
    """

    folder: epath.Path
    section: ConfigDict
    class_type: str
    relative_to_pool: bool = False


def _has_pool(config: ConfigDict) -> bool:
    """Whether the base is trained on images of another source."""
    return bool(config.pretrain.source) and not config.base.path


def _advance(progress: Progress, total: int) -> None:
    """Advances by an image of `total`."""
    progress.extend(total)
    progress.advance(1)


def _choose_pool(config: ConfigDict, source: Source) -> SplitIndices:
    """Which images of `pretrain.source` are the pool."""
    seed = base_pool.seed_of(config.seed, config.pretrain.seed)
    return base_pool.choose(source, config.pretrain.pool.images, seed=seed)


def _pool_captions(config: ConfigDict) -> ConfigDict:
    """`config.caption` for the images of `pretrain.source`."""
    section, pool = config.caption.copy_and_resolve_references(), config.pretrain.pool
    section.captioner = pool.captioner or section.captioner
    section.attributes = pool.attributes or section.attributes
    section.file = pool.file
    return section


def _open_pool(config: ConfigDict) -> Source:
    """The source of `pretrain.source`."""
    data, pool = config.data.copy_and_resolve_references(), config.pretrain.pool
    data.source, data.dir, data.classes = config.pretrain.source, pool.dir, pool.classes
    data.image_column, data.label_column = pool.image_column, pool.label_column
    data.train, data.test, data.labels, data.validation = (), (), "", "join"
    return _open(data)


def _gather_once(config: ConfigDict, stage: Stage) -> None:
    """Reads the images, unless that is done."""
    reads = {stage.folder: lambda folder: _gather(config, _open(config.data), folder)}
    if _has_pool(config):
        reads[stage.folder / base_pool.FOLDER] = functools.partial(_gather_pool, config)
    for folder, read in reads.items():
        if all(stage.digests.intact(folder / name) for name in splits.FILES):
            continue
        try:
            read(folder)
        except UserError:  # keeps nothing, so that other settings may be tried
            stage.abandon()
            raise
        stage.digests.add(*(folder / name for name in splits.FILES))


def _captioned(folder: epath.Path) -> tuple[list[str], list[str]]:
    """Ids and class names of the images with captions, the first of `images.npy`."""
    pool, train = (splits.read_split(folder, name) for name in ("pool", "train"))
    labels = np.concatenate([pool.labels, train.labels])
    return [*pool.ids, *train.ids], [train.class_names[label] for label in labels]


def _write(
    config: ConfigDict, stage: Stage, parts: Sequence[Captioned]
) -> dict[str, int]:
    """Writes the captions and what shows the dataset; returns counts."""
    folder, raw, texts = stage.folder, [], []
    for part in parts:
        mine = _captions(part, stage)
        cleaned = _write_captions(part, mine)
        raw += mine
        texts += cleaned
        if part.folder == folder and config.generate.sets:
            train = splits.read_split(folder, "train")
            summary.warn_of_same_captions(cleaned[len(mine) - len(train.ids) :], train)
    summary.write_contact_sheet(folder)
    for part in parts:
        for partial in _partial_captions(part.folder):
            partial.unlink()
    sizes = files.read_json(folder / "splits.json")
    counts = {name: len(ids) for name, ids in sizes.items()}
    if len(parts) > 1:
        counts["pool_elsewhere"] = len(_captioned(parts[1].folder)[0])
    counts["cleaned"] = sum(a != b for a, b in zip(raw, texts, strict=True))
    counts["empty"] = sum(not text for text in texts)
    shown = ", ".join(f"{count} {name}" for name, count in counts.items())
    logging.info("%d captions; %s", len(texts), shown)
    logging.info("contact sheet: %s", folder / "contact_sheet.png")
    return counts


def _write_captions(part: Captioned, raw: Sequence[str]) -> list[str]:
    """Writes the captions of a folder; returns them as they are written."""
    ids, _ = _captioned(part.folder)
    section = part.section
    collapse = section.captioner in _DEFAULT_MODEL
    texts = [captions.clean(text, collapse=collapse) for text in raw]
    captions.write_captions(
        part.folder / "captions.jsonl",
        dict(zip(ids, texts, strict=True)),
        captioner=section.captioner,
        version=_model(section) or VERSION,
    )
    return texts


def table(workdir: epath.Path) -> str:
    """Summarises the dataset, as lines for a terminal; the stage must be complete."""
    counts = read_manifest(workdir, "caption")["counts"]
    return summary.table(workdir / "caption", counts)


def count_images(
    config: ConfigDict, workdir: epath.Path | None
) -> dict[str, Int[np.ndarray, " K"]]:
    """Images of each class by split.

    Args:
      config: of the run.
      workdir: that has the finished stage; None: the source is opened, but no image
        decoded, so that bad ones are not known.

    Returns:
      the images of each class of `pool`, which may have other classes, `train`, ...
    """
    has_pool = _has_pool(config)
    if workdir is not None:
        found = splits.count_images(workdir / "caption")
        if has_pool:
            pool = splits.count_images(workdir / "caption" / base_pool.FOLDER)
            found["pool"] = pool["pool"]
        return found
    source = _open(config.data)
    found = _counts(source, _splitter(source, config)(np.ones(len(source), bool)))
    if has_pool:
        pool = _open_pool(config)
        chosen = _choose_pool(config, pool)
        found["pool"] = _counts(pool, chosen)["pool"]
    return found


def _counts(source: Source, rows: SplitIndices) -> dict[str, Int[np.ndarray, " K"]]:
    """Images of each class by split."""
    classes = len(source.class_names)
    return {
        name: np.bincount(source.labels[mine], minlength=classes)
        for name, mine in rows.items()
    }


def price(config: ConfigDict, sizes: Sizes) -> Work:
    """What there is to read and to caption."""
    images, captions_ = (
        sizes.pool + sizes.images + sizes.test,
        sizes.pool + sizes.images,
    )
    section, side, host = config.caption, config.data.size, {}
    if section.captioner in _DEFAULT_MODEL:
        batch = min(section.batch_size, captions_)
        host["a batch of the captioner"] = batch * 4 * 3 * _NETWORK_SIDE**2
    speed = {k: v for k, v in section.to_dict().items() if k != "file"}
    return Work(
        {"images": images, "captions": captions_},
        unit="images",
        speed={"source": config.data.source, "size": side, "caption": speed},
        disk={"pixels": images * 3 * side**2},
        host=host,
        lower=("caption.batch_size",),
    )


def stage_spec(config: ConfigDict) -> Spec:
    """What images, splits and captions depend on."""
    section = config.caption.to_dict() | {"version": VERSION}
    section.pop("batch_size")  # does not change captions
    settings = {"seed": config.seed, "data": config.data.to_dict(), "caption": section}
    named_files = {"caption.file": _add_sha256(section, "caption")}
    if config.pretrain.seed >= 0 and config.data.pool:
        settings["pretrain"] = {"seed": config.pretrain.seed}
    if _has_pool(config):
        pool = config.pretrain.pool.to_dict()
        settings["pretrain"] = {
            "seed": config.pretrain.seed,
            "source": config.pretrain.source,
            "pool": pool,
        }
        named_files["pretrain.pool.file"] = _add_sha256(pool, "pretrain.pool")
    return Spec(
        "caption",
        settings,
        restores=("contact_sheet.png",),
        named_files=named_files,
    )


def _add_sha256(section: dict[str, Any], name: str) -> str:
    """Adds that of the user's captions to a section; returns the setting's name."""
    if section["captioner"] == "file":  # which is known by its content
        path = epath.Path(section["file"])
        section["file_sha256"] = files.sha256(path) if path.is_file() else ""
    return f"{name}.file_sha256"


def _require_classes(config: ConfigDict, source: Source) -> None:
    """Refuses a single class where the run would train classifiers on it."""
    stages = config.stages.replace(" ", "").split(",")
    if len(source.class_names) < 2 and {"all", "classify"} & {*stages}:
        raise UserError(
            "config.data.source",
            wanted="at least two classes, which the stage classify tells apart",
            got=f"one, {source.class_names[0]!r}",
            fix="Sort the images by class, or stop before classify: --config.stages="
            f"caption,{'' if config.base.path else 'pretrain,'}encode,pairs,finetune,"
            "mix,generate.",
        )


def _check_fields(data: ConfigDict, section: ConfigDict) -> None:
    _sizes(data).check()
    _decoder(data)
    known = ("caption", "class_type", "label")
    captions.check_template(data.prompt, "config.data.prompt", known)
    if section.captioner == "template":
        name = "config.caption.template"
        captions.check_template(section.template, name, known[1:])


def _check_captioner(section: ConfigDict, source: Source, chosen: SplitIndices) -> None:
    """Checks what the captioner needs, without loading it."""
    if section.captioner == "file":
        indices = np.concatenate([chosen["pool"], chosen["train"]])
        ids = [source.ids[i] for i in indices]
        known = {*source.ids, *source.defects}
        captions.read_user_captions(section.file, ids, known)
    elif section.captioner in _DEFAULT_MODEL:
        network = _network(section.captioner)
        require_one_of("config.caption", section.to_dict(), {"dtype": network.DTYPES})
        network.check_model(_model(section))


def _model(section: ConfigDict) -> str:
    return section.model or _DEFAULT_MODEL.get(section.captioner, "")


def _open(data: ConfigDict) -> Source:
    source = open_source(
        data.source,
        _decoder(data),
        image_column=data.image_column,
        label_column=data.label_column,
        data_dir=data.dir,
        folder=FolderOptions(
            train=tuple(data.train),
            test=tuple(data.test),
            labels=data.labels,
            each_frame=data.frames == "each",
        ),
        keep_validation=data.validation == "keep",
    )
    if data.validation == "keep" and validation_of(source) is None:
        raise UserError(
            "config.data.validation",
            wanted="join, or a source with validation images of its own",
            got="keep, and none",
            fix="Use join; config.classify.validation holds out training images.",
        )
    if data.classes:
        source = ClassSubset(source, data.classes)
    check_class_names(source.class_names)
    return source


def _decoder(data: ConfigDict) -> Decoder:
    """The decoder for `data.window` ("image" or "LOW,HIGH") and `data.max_pixels`."""
    if data.window == "image":
        return Decoder(max_pixels=data.max_pixels)
    try:
        low, high = (float(number) for number in data.window.split(","))
    except ValueError:
        low = high = 0.0
    if not -math.inf < low < high < math.inf:  # nor NaN
        raise UserError(
            "config.data.window",
            wanted='"image" or two finite numbers, the lower one first',
            got=repr(data.window),
            fix="Write e.g. --config.data.window=0,4095 for 12 bits.",
        )
    return Decoder(max_pixels=data.max_pixels, window=(low, high))


def _sizes(data: ConfigDict) -> splits.SplitSizes:
    return splits.SplitSizes(
        pool=data.pool,
        per_class=data.per_class,
        fraction=data.fraction,
        test=data.test_fraction,
    )


def _splitter(source: Source, config: ConfigDict) -> Callable[..., SplitIndices]:
    """Returns `make_splits` as a function of `usable` and `copies`, bool [N]."""
    named = group_names(source, config.data.group)
    codes = None if named is None else np.unique(named, return_inverse=True)[1]

    def split(usable: np.ndarray, copies: np.ndarray | None = None) -> SplitIndices:
        return splits.make_splits(
            source.labels,
            source.class_names,
            _sizes(config.data),
            seed=config.seed,
            pool_seed=None if config.pretrain.seed < 0 else config.pretrain.seed,
            is_test=source.is_test,
            is_validation=validation_of(source),
            usable=usable,
            copies=copies,
            groups=codes,
        )

    return split


def _gather(config: ConfigDict, source: Source, folder: epath.Path) -> None:
    """Writes the images and their rows; fails with a list of all bad images."""
    data = config.data
    split = _splitter(source, config)
    total = sum(map(len, split(np.ones(len(source), bool)).values()))
    progress = Progress("images", total, unit="image")
    bad: dict[str, str] = {}

    def on_bad(found: dict[int, str]) -> None:
        bad.update(source.defects | {source.ids[i]: found[i] for i in found})
        _report_bad_images(bad, folder / "bad_images.jsonl", data.on_bad_image)

    copies: dict[int, dict[str, str]] = {}

    def find_copies(gathered: Gathered) -> list[int]:
        new = _find_duplicates(source, gathered)
        copies.update(new)
        return list(new) if data.duplicates == "remove" else []

    gathered = gather(
        source,
        folder / "images.npy",
        split,
        ReaderOptions(data.size, data.resize, data.resample, data.max_pixels),
        on_bad=on_bad,
        copies=find_copies,
        on_image=functools.partial(_advance, progress),
    )
    progress.close()
    files.write_jsonl(folder / "duplicates.jsonl", list(copies.values()))
    _warn_of_duplicates(list(copies.values()), data.duplicates)
    train = gathered.splits["train"]
    conflicts = _find_conflicts(source, gathered)
    files.write_jsonl(folder / "label_conflicts.jsonl", conflicts)
    groups = group_names(source, data.group)
    if groups is not None:
        _warn_of_groups(groups, gathered.splits)
    summary.warn_of_classes(source.class_names, source.labels[train])
    write_rows(
        folder,
        source,
        gathered,
        groups=groups,
        name=data.source,
        remarks=source.remarks,
        duplicates=data.duplicates,
        class_folders=class_folders(folders_of(source)),
    )


def _gather_pool(config: ConfigDict, folder: epath.Path) -> None:
    """Writes the images of `pretrain.source` and their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    data, source, pool = config.data, _open_pool(config), config.pretrain.pool
    count = len(_choose_pool(config, source)["pool"])
    progress = Progress("images of pretrain.source", count, unit="image")
    bad: dict[str, str] = {}

    def on_bad(found: dict[int, str]) -> None:
        bad.update(source.defects | {source.ids[i]: found[i] for i in found})
        _report_bad_images(bad, folder / "bad_images.jsonl", data.on_bad_image)

    base_pool.read(
        source,
        folder,
        ReaderOptions(data.size, data.resize, data.resample, data.max_pixels),
        name=config.pretrain.source,
        count=pool.images,
        seed=base_pool.seed_of(config.seed, config.pretrain.seed),
        test=splits.read_split(folder.parent, "test"),
        policy=pool.duplicates,
        on_bad=on_bad,
        on_image=functools.partial(_advance, progress),
    )
    progress.close()
    shared = files.read_jsonl(folder / "duplicates.jsonl")
    if shared:
        logging.warning(
            "%d images of pretrain.source are also in test; removed", len(shared)
        )


def _report_bad_images(bad: dict[str, str], path: epath.Path, policy: str) -> None:
    rows = [{"image": name, "reason": reason} for name, reason in bad.items()]
    files.write_jsonl(path, rows)
    if bad and policy == "fail":
        raise UserError(
            "config.data.source",
            wanted="images that can all be used",
            got=f"{len(bad)} that cannot",
            fix="Fix or remove them, or continue without them with "
            f"--config.data.on_bad_image=skip. {path} lists them.",
            details=_bad_lines(bad),
        )
    if bad:
        logging.warning("leaving out %d bad images, listed in %s", len(bad), path)


def _bad_lines(bad: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}: {reason}" for name, reason in bad.items())


def _find_duplicates(source: Source, gathered: Gathered) -> dict[int, dict[str, str]]:
    """Images of train and pool that are also in test -> their ids and that image's."""
    found, test = {}, gathered.splits["test"].tolist()
    references = [gathered.info[i].fingerprint for i in test]
    for part in ("train", "pool"):
        mine = gathered.splits[part].tolist()
        queries = [gathered.info[i].fingerprint for i in mine]
        for i, j in duplicates.find(queries, references):
            found[mine[i]] = {part: source.ids[mine[i]], "test": source.ids[test[j]]}
    return found


def _find_conflicts(source: Source, gathered: Gathered) -> list[dict[str, str]]:
    """Training images with the picture of another one that has another label."""
    train = gathered.splits["train"].tolist()
    prints = [gathered.info[i].fingerprint for i in train]
    names = [source.class_names[source.labels[i]] for i in train]
    pairs = duplicates.find_conflicts(prints, source.labels[train].tolist())
    if pairs:
        logging.warning(
            "%d training images show the picture of one with another label; "
            "label_conflicts.jsonl lists them",
            len(pairs),
        )
    return [
        {
            "image": source.ids[train[i]],
            "label": names[i],
            "same_as": source.ids[train[j]],
            "with_label": names[j],
        }
        for i, j in pairs
    ]


def _warn_of_duplicates(rows: list[dict[str, str]], policy: str) -> None:
    train = sum("train" in row for row in rows)
    pool = len(rows) - train
    counted = [f"{train} training"] * bool(train) + [f"{pool} pool"] * bool(pool)
    what = f"{' and '.join(counted)} images are also in test"
    if rows and policy == "keep":
        logging.warning(
            "%s (duplicates.jsonl); --config.data.duplicates=remove removes them", what
        )
    elif rows:
        logging.warning("%s; removed, and replaced where there are others", what)


def _warn_of_groups(groups: Sequence[str], chosen: SplitIndices) -> None:
    """Warns of groups that the source's own parts have on both sides."""
    test = {groups[i] for i in chosen["test"]}
    for part in ("train", "pool", splits.VALIDATION):
        if both := sorted(test & {groups[i] for i in chosen.get(part, ())}):
            logging.warning(
                "%d groups of config.data.group are in both %s and test of the "
                "source's own split, e.g. %s: test accuracies are too high",
                len(both),
                part,
                ", ".join(both[:3]),
            )


def _captions(part: Captioned, stage: Stage) -> list[str]:
    """The captions of the first images of a folder; those of a network are saved."""
    section = part.section
    ids, class_names = _captioned(part.folder)
    if section.captioner == "file":
        return captions.read_captions(section.file, ids)
    if section.captioner == "template":
        values = {"class_type": part.class_type}
        texts = (section.template.format(label=name, **values) for name in class_names)
        return [captions.readable(text) for text in texts]
    if section.captioner == "attributes":
        images = files.map_array(part.folder / "images.npy")[: len(ids)]
        pool = files.read_json(part.folder / "splits.json")["pool"]
        first = len(pool) if part.relative_to_pool else None
        return attribute_captions(images, section.attributes, relative_to=first)
    saved = _saved_captions(stage, part.folder)
    return [saved[id_] for id_ in ids]


def _network_captions(part: Captioned, stage: Stage) -> None:
    """Captions images by a network; saves every few seconds, and resumes from that.

    Batches are shared out among the processes.

    Args:
      part: the images.
      stage: the opened stage.
    """
    section, folder = part.section, part.folder
    ids, saved = _captioned(folder)[0], _saved_captions(stage, folder).keys()
    processes.barrier("the captions that were saved")  # before there are others
    todo = [i for i, id_ in enumerate(ids) if id_ not in saved]
    batches: dict[int, list[int]] = {}
    for i in todo:
        batches.setdefault(i // section.batch_size, []).append(i)
    shares = processes.share([*batches.values()], [*map(len, batches.values())])
    mine = [i for rows in shares for i in rows]
    images = files.map_array(folder / "images.npy")[: len(ids)]
    progress = Progress(
        "captions", len(ids), done=len(ids) - len(todo), unit="image", shared=True
    )
    unsaved: dict[int, str] = {}
    last_save, left = time.monotonic(), len(mine)
    for row, text in _run_network(section, folder, images, mine):
        unsaved[row] = text
        left -= 1
        progress.advance(1)
        if not left or time.monotonic() - last_save > _SAVE_SECONDS:
            saved_in = folder / "captions.partial" / f"{min(unsaved):08d}.jsonl"
            lines = [{"id": ids[i], "caption": unsaved[i]} for i in unsaved]
            files.write_jsonl(saved_in, lines)
            stage.digests.add(saved_in)
            unsaved, last_save = {}, time.monotonic()
    progress.close()
    processes.barrier("the end of captioning", processes.WORK_SECONDS)


def _saved_captions(stage: Stage, folder: epath.Path) -> dict[str, str]:
    """Image id -> caption, of those of a folder that are on the disk."""
    return {
        row["id"]: row["caption"]
        for part in _partial_captions(folder)
        if stage.digests.intact(part)
        for row in files.read_jsonl(part)
    }


def _run_network(
    section: ConfigDict, folder: epath.Path, images: np.ndarray, rows: list[int]
) -> Iterator[tuple[int, str]]:
    """Yields (row, caption) for these rows of the images."""
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
    if section.captioner == "blip2":  # runs in another process, which maps the file
        path = folder / "images.npy"
        yield from network.captions(path, rows, prompt=section.instruction, **options)
    else:
        runtime.start()
        yield from network.captions(images, rows, **options)


def _network(captioner: str) -> ModuleType:
    if captioner == "blip2":
        from mvc_jax.checkpoints import blip2_captioner as network
    else:
        from mvc_jax.checkpoints import vit_gpt2_captioner as network
    return network


def _partial_captions(folder: epath.Path) -> list[epath.Path]:
    """Files of captions that an interrupted run saved."""
    return files.matching(folder, "captions.partial/*.jsonl")
