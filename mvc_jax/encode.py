"""Images, captions -> VAE moments and text states: a cache for the later stages.

Reads: the base model, training images, captions. Writes, in shards: `moments/`
[V N, h, w, 2c], with image i in row i and, where `encode.flip` makes V = 2, its mirror
image in row N + i; `text_states/` [P, L, D] of the distinct prompts, the empty one
first. Also `prompts.jsonl`, a row for each training image; `offsets.jsonl`, where the
tokens of each distinct prompt are in it; and `base.json`, the base model, of which
later stages read the same revision. Of Stable Diffusion XL also `pooled/` [P, Dp], the
prompts' pooled embeddings, and `time_ids.npy` [N, 6], the images' sizes.

Of many processes each encodes some of the shards, on its own devices; the first writes
the other files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath, epy
from jaxtyping import UInt8
from ml_collections import ConfigDict

from mvc_jax import files, processes, work
from mvc_jax.data import cache, captions, shards, splits, time_ids
from mvc_jax.errors import UserError, require_disk_space
from mvc_jax.mixing import marked_words
from mvc_jax.stage import Spec, Stage, is_complete, open_stage
from mvc_jax.training.console import Progress
from mvc_jax.work import BaseSizes, Sizes, Work

with epy.lazy_imports():
    import jax

    from mvc_jax.checkpoints import base_sizes, diffusers_layout, pipeline_folder
    from mvc_jax.models import stable_diffusion
    from mvc_jax.training import sharding

_TOKENIZED = 4096  # prompts at once


def check(config: ConfigDict) -> None:
    """Checks the section `base`."""
    base = config.base
    if base.path:  # reads files, so it comes last
        diffusers_layout.check_base(
            base.path,
            base.variant,
            base.revision,
            finetuned=base.finetuned,
            size=config.data.size,
        )
    elif base.variant or base.revision:
        raise UserError(
            "config.base",
            wanted="no variant and no revision without a path: `pretrain` trains the "
            "base",
            got=f"variant={base.variant!r}, revision={base.revision!r}",
            fix="Leave both empty, or name a base in config.base.path.",
        )


def base_of(config: ConfigDict, workdir: epath.Path | None) -> BaseSizes:
    """Sizes of the base model.

    Args:
      config: of the run.
      workdir: that has the stage `pretrain`; None: the config names a base.
    """
    base = config.base
    if workdir and not base.path:
        return base_sizes.of_folder(workdir / "pretrain" / "model")
    return base_sizes.find(base.path, base.variant, base.revision)


def price(config: ConfigDict, sizes: Sizes) -> Work:
    """What there is to encode."""
    section, side, base = config.encode, config.data.size, sizes.base
    images = sizes.images * (2 if section.flip else 1)
    number = np.dtype(section.dtype).itemsize
    moments = images * number * math.prod(base.moments_shape(side))
    least, most = (n * number * base.text_numbers() for n in sizes.prompts)
    batch = section.batch_size * side**2
    at_once = min(batch, max(work.AUTOENCODER_PIXELS, side**2))
    of_images = {
        "a batch of images": 3 * batch,
        "some of it in the autoencoder": 4 * at_once * 2 * base.vae_channels,
    }
    # The hidden layers of CLIP's text encoders are four times as wide as its states.
    hidden = 4 * section.batch_size * base.text_numbers()
    of_texts = {"a batch of prompts in the text encoder": 4 * hidden}
    return Work(
        {"images": images, "prompts, at most": sizes.prompts[1]},
        unit="images",
        speed={
            "base": base.speed,
            "size": side,
            "batch_size": section.batch_size,
            "mesh": config.mesh.to_dict(),
        },
        on_devices=True,
        disk={"moments": moments, "text states": most},
        asks=moments + least,
        leaves=moments + least,
        host={"a batch of images": 3 * batch},
        devices=max(of_images, of_texts, key=lambda found: sum(found.values())),
        lower=("encode.batch_size",),
    )


def stage_spec(config: ConfigDict) -> Spec:
    """What the cache depends on."""
    section = config.encode.to_dict()
    del section["batch_size"]  # shards do not depend on it
    settings = {
        "seed": config.seed,
        "data": config.data.to_dict(),
        "base": config.base.to_dict(),
        "encode": section,
    }
    inputs = ("caption",) if config.base.path else ("caption", "pretrain")
    arrays = ("moments/*", "text_states/*", f"{cache.POOLED}/*")
    return Spec("encode", settings, inputs, restores=arrays)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Encodes every training image and every distinct prompt, shard by shard."""
    workdir = epath.Path(workdir)
    stage = open_stage(workdir, stage_spec(config))
    if stage.complete:
        return
    fresh = not is_complete(workdir, "encode")  # otherwise some files were deleted
    try:
        written, counts = encode(config, workdir, stage)
    except UserError as error:
        together = error.shared or processes.count() == 1  # else others may be writing
        if together and fresh and not files.matching(stage.folder, "*/*.npy"):
            stage.abandon()  # nothing was written, so other settings may follow
            made = ("base.json", "prompts.jsonl", marked_words.OFFSETS, cache.TIME_IDS)
            for name in made:
                (stage.folder / name).unlink(missing_ok=True)
        raise
    stage.finish(written, **counts)


def encode(
    config: ConfigDict, workdir: epath.Path, stage: Stage
) -> tuple[list[str], dict[str, int]]:
    """Writes the missing files of the cache.

    Returns:
      the files of the cache, relative to the stage's folder, and counts for the
      manifest.
    """
    section, folder = config.encode, stage.folder
    mesh = sharding.local_mesh(config.mesh.data, config.mesh.fsdp)
    base = _find_base(config, workdir, stage)
    model, _ = diffusers_layout.load(base, (), config.base.variant)
    model = dataclasses.replace(model, mesh=mesh)
    train = splits.read_split(workdir / "caption", "train")
    processes.on_first(
        "prompts", lambda: _write_prompts(config, workdir, stage, model, train)
    )
    written = ["base.json", "prompts.jsonl", marked_words.OFFSETS]
    if model.pooled_width:
        processes.on_first("sizes", lambda: _write_time_ids(config, workdir, stage))
        written.append(cache.TIME_IDS)
    rows = files.read_jsonl(folder / "prompts.jsonl")
    prompts = distinct_prompts(rows)
    cut = captions.cut_by_class(rows)
    report_cut_captions(cut, model.context_length)

    parts = (
        *_text_parts(folder, model, prompts, section.dtype),
        _image_part(folder, model, train, section.dtype, flip=section.flip),
    )
    _check_disk_space(folder, parts)
    components = {name for part in parts for name in part.components}
    # What only later stages read must be usable too, before hours of work.
    for name in sorted({*model.components} - components):
        diffusers_layout.require_finite(base, name, config.base.variant)
    _, params = diffusers_layout.load(base, sorted(components), config.base.variant)
    size = sharding.padded_size(section.batch_size, mesh)
    for part in parts:
        fill(part, params, size=size, mesh=mesh)
    logging.info("%d images, %d distinct prompts", len(train.images), len(prompts))
    written += [name for part in parts for name in part.writer.names]
    return written, {
        "images": len(train.images),
        "prompts": len(prompts),
        "captions_cut": sum(cut["part"].values()),
        "captions_lost": sum(cut["none"].values()),
    }


def _write_prompts(
    config: ConfigDict,
    workdir: epath.Path,
    stage: Stage,
    model: stable_diffusion.StableDiffusion,
    train: splits.Split,
) -> None:
    """Writes `prompts.jsonl` and `offsets.jsonl`, unless they are there."""
    listed = stage.folder / "prompts.jsonl"
    if not stage.digests.intact(listed):
        rows = prompt_rows(
            model,
            train,
            captions.read_captions(workdir / "caption" / "captions.jsonl", train.ids),
            template=config.data.prompt,
            class_type=config.data.class_type,
        )
        files.write_jsonl(listed, rows)
        stage.digests.add(listed)
    rows = files.read_jsonl(listed)  # of the run that began, where it goes on
    offsets = stage.folder / marked_words.OFFSETS
    if not stage.digests.intact(offsets):
        write_offsets(offsets, model, distinct_prompts(rows))
        stage.digests.add(offsets)


def _write_time_ids(config: ConfigDict, workdir: epath.Path, stage: Stage) -> None:
    """Writes `time_ids.npy`, unless it is there."""
    path = stage.folder / cache.TIME_IDS
    if not stage.digests.intact(path):
        rows = files.read_jsonl(workdir / "caption" / "images.jsonl")
        rows = [row for row in rows if row["split"] == "train"]
        data = config.data
        files.write_array(path, time_ids.time_ids(rows, data.size, resize=data.resize))
        stage.digests.add(path)


def _find_base(config: ConfigDict, workdir: epath.Path, stage: Stage) -> epath.Path:
    """The folder of the base model, checked; `base.json` gets its path and revision.

    Of many processes the first chooses the revision, and each has it in a folder.
    """
    base = config.base
    path = base.path or workdir / "pretrain" / "model"
    record = stage.folder / "base.json"

    def choose() -> tuple[str, str | None]:
        revision = base.revision
        if stage.digests.intact(record):  # the stage resumes, with the same commit
            revision = files.read_json(record)["revision"] or ""
        folder, commit = pipeline_folder.resolve(path, base.variant, revision)
        diffusers_layout.check_base(
            folder, base.variant, finetuned=base.finetuned, size=config.data.size
        )
        found = {"path": base.path, "variant": base.variant, "revision": commit}
        files.write_json(record, found)
        stage.digests.add(record)
        return str(folder), commit

    folder, commit = processes.on_first("the base model", choose)
    if not processes.is_first():
        folder, _ = pipeline_folder.resolve(path, base.variant, commit or "")
    return epath.Path(folder)


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of the cache, and how its rows are computed.

    Attributes:
      unit: what a row is, for the terminal.
      components: whose parameters `encode` is given.
      encode: (parameters, batch of inputs) -> rows.
      inputs: row numbers -> inputs, on the host.
      name: row number -> its name, for an error.
      writer: of the array.
    """

    unit: str
    components: tuple[str, ...]
    encode: Callable[[Any, Any], jax.Array]
    inputs: Callable[[range], np.ndarray]
    name: Callable[[int], str]
    writer: shards.Writer


def fill(part: Part, params: Any, *, size: int, mesh: jax.sharding.Mesh) -> None:
    """Writes the missing shards of a part, shared out among the processes.

    No batch crosses the border of a shard, so that a shard is computed from the same
    batches whichever shards exist already, and whoever computes it.

    Args:
      part: of the cache.
      params: host parameters, by component.
      size: rows of a batch, a multiple of the number of devices.
      mesh: the devices.

    Raises:
      UserError: a row is not finite.
    """
    params = {name: params[name] for name in part.components}
    encode = sharding.over_batches(part.encode, params, size=size, mesh=mesh)
    writer, missing = part.writer, part.writer.missing
    total = writer.shape[0]
    sizes = [len(rows) for rows in missing]
    progress = Progress(
        f"encode/{part.unit}s",
        total,
        done=total - sum(sizes),
        unit=part.unit,
        shared=True,
    )
    with contextlib.closing(progress):
        for rows in processes.share(missing, sizes):
            shard = np.empty((len(rows), *writer.shape[1:]), writer.dtype)
            starts = range(0, len(rows), size)
            batches = encode(part.inputs(rows[i : i + size]) for i in starts)
            for start, batch in zip(starts, batches, strict=True):
                with np.errstate(over="ignore"):  # infinity is an error below
                    shard[start : start + size] = batch
                _require_finite(part, rows[start : start + size], shard[start:])
                progress.advance(len(batch))
            writer.write(rows, shard)
    writer.finish()


def image_rows(
    images: UInt8[np.ndarray, "N H W 3"], rows: range
) -> UInt8[np.ndarray, "B H W 3"]:
    """The images of rows of the moments: mirror images from row N on."""
    variants, indices = np.divmod(np.asarray(rows), len(images))
    batch = images[indices]
    mirrored = variants == 1
    batch[mirrored] = batch[mirrored, :, ::-1]
    return batch


def prompt_rows(
    model: stable_diffusion.StableDiffusion,
    train: splits.Split,
    texts: list[str],
    *,
    template: str,
    class_type: str,
) -> list[dict]:
    """Prompts of the training images, with the positions of their captions' tokens.

    Args:
      model: the base.
      train: the training images.
      texts: their captions.
      template: of the prompts.
      class_type: in the prompts.

    Returns:
      rows `{"id", "label", "class_name", "prompt", "state", "caption_start",
      "caption_tokens", "tokens"}`: `state` is the index of the prompt among the
      distinct ones; the caption has `caption_tokens` tokens from `caption_start` on,
      where BOS is token 0; `tokens` counts all tokens with BOS and EOS. Where not all
      of a caption fits, `caption_kept` is `"part"` or `"none"`.
    """
    rows: list[dict] = []
    index_of = {"": 0}
    for id_, label, text in zip(train.ids, train.labels, texts, strict=True):
        name = train.class_names[label]
        prompt = captions.prompt(
            template,
            text,
            class_type=class_type,
            class_name=name,
            count_tokens=model.count_tokens,
            max_tokens=model.context_length,
        )
        # Each count includes BOS and EOS. The caption follows BOS and the text before
        # it.
        row = {
            "id": id_,
            "label": int(label),
            "class_name": name,
            "prompt": prompt.text,
            "state": index_of.setdefault(prompt.text, len(index_of)),
            "caption_start": model.count_tokens(prompt.before) - 1,
            "caption_tokens": model.count_tokens(prompt.caption) - 2,
            "tokens": model.count_tokens(prompt.text),
        }
        if prompt.kept != "all":
            row["caption_kept"] = prompt.kept
        rows.append(row)
    return rows


def write_offsets(
    path: epath.Path, model: stable_diffusion.StableDiffusion, prompts: Sequence[str]
) -> None:
    """Writes a row for each prompt: start and stop of its tokens, one after another."""
    rows = []
    for start in range(0, len(prompts), _TOKENIZED):
        some = model.token_offsets(prompts[start : start + _TOKENIZED])
        rows += [{"offsets": [x for pair in pairs for x in pair]} for pairs in some]
    files.write_jsonl(path, rows)


def distinct_prompts(rows: Sequence[dict]) -> list[str]:
    """The prompts of `prompt_rows` by their `state`, `""` first."""
    prompts = {0: ""} | {row["state"]: row["prompt"] for row in rows}
    return [prompts[state] for state in sorted(prompts)]


def report_cut_captions(cut: captions.CutCaptions, length: int) -> None:
    """Logs how many captions of each class are cut, and how many are lost."""
    if cut["part"]:
        logging.info(
            "%s to the %d tokens of a prompt", captions.counted(cut, "part"), length
        )
    if cut["none"]:
        logging.warning(
            "%s: the class prompt fills the %d tokens of a prompt; shorten "
            "config.data.prompt or the class name",
            captions.counted(cut, "none"),
            length,
        )


def _text_parts(
    folder: epath.Path,
    model: stable_diffusion.StableDiffusion,
    prompts: list[str],
    dtype: str,
) -> list[Part]:
    """The arrays of the prompts: text states, and what XL has besides."""
    states = (model.context_length, model.text_width)
    arrays = [("text_states", model.text_encoders, model.text_states, states)]
    if width := model.pooled_width:
        second = model.text_encoders[1:]
        arrays.append((cache.POOLED, second, model.pooled_text, (width,)))
    return [
        Part(
            unit="prompt",
            components=components,
            encode=encode,
            inputs=lambda rows: model.tokenize(prompts[rows.start : rows.stop]),
            name=lambda row: repr(prompts[row]),
            writer=shards.Writer(
                folder / name, rows=len(prompts), row_shape=shape, dtype=dtype
            ),
        )
        for name, components, encode, shape in arrays
    ]


def _image_part(
    folder: epath.Path,
    model: stable_diffusion.StableDiffusion,
    train: splits.Split,
    dtype: str,
    *,
    flip: bool,
) -> Part:
    side = train.images.shape[1] // model.downsampling
    return Part(
        unit="image",
        components=("vae",),
        encode=model.encode_pixels,
        inputs=lambda rows: image_rows(train.images, rows),
        name=lambda row: train.ids[row % len(train.ids)],
        writer=shards.Writer(
            folder / "moments",
            rows=len(train.images) * (2 if flip else 1),
            row_shape=(side, side, 2 * model.latent_channels),
            dtype=dtype,
        ),
    )


def _check_disk_space(folder: epath.Path, parts: Sequence[Part]) -> None:
    arrays = [
        f"{part.writer.shape[0]} {part.unit}s x {part.writer.row_bytes} bytes"
        for part in parts
    ]
    require_disk_space(
        folder,
        sum(part.writer.missing_bytes for part in parts),
        what=f"the rest of the cache ({' + '.join(arrays)})",
        fix="Free some or use a --workdir on another disk; "
        "--config.encode.dtype=float16 needs half.",
    )


def _require_finite(part: Part, rows: range, array: np.ndarray) -> None:
    finite = np.isfinite(array[: len(rows)]).reshape(len(rows), -1).all(axis=1)
    if not finite.all():
        raise UserError(
            f"encode: {part.unit} {part.name(rows[int(np.argmin(finite))])}",
            wanted="finite numbers from the base model",
            got=f"NaN or infinity, or numbers outside the range of {array.dtype}",
            fix="Set --config.encode.dtype=float32; if it is, the base model's weights "
            "are damaged: download them again.",
        )
