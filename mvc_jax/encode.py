"""Images, captions -> VAE moments and text states: computed once, read many times.

Reads: the base model, training images, captions. Writes, in shards: `moments/`
[V N, h, w, 2c], image i in row i and, where `encode.flip` makes V = 2, its mirror image
in row N + i; `text_states/` [P, L, D] of the distinct prompts, the empty one first. And
`prompts.jsonl`, a row for each training image, and `base.json`, which base model that
was, so that later stages read the same.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.data import captions, manifest, shards, splits
from mvc_jax.errors import UserError, require, require_room
from mvc_jax.models import checkpoint_folder, diffusers_layout, stable_diffusion
from mvc_jax.training import sharding
from mvc_jax.training.console import Progress

DTYPES = ("float32", "float16")


def check(config: ConfigDict) -> None:
    """Checks the sections `encode` and `base`."""
    base = config.base
    if base.path:
        diffusers_layout.check_base(
            *(base.path, base.variant, base.revision),
            finetuned=base.finetuned,
            size=config.data.size,
        )
    require(
        bool(base.path) or not (base.variant or base.revision),
        "config.base",
        wanted="no variant and no revision without a path: `pretrain` makes the base",
        got=f"variant={base.variant!r}, revision={base.revision!r}",
        fix="Leave both empty, or name a base in config.base.path.",
    )
    require(
        config.encode.batch_size > 0,
        "config.encode.batch_size",
        wanted="at least 1",
        got=config.encode.batch_size,
        fix="Raise it.",
    )
    require(
        config.encode.dtype in DTYPES,
        "config.encode.dtype",
        wanted=f"one of {', '.join(DTYPES)}",
        got=repr(config.encode.dtype),
        fix="Name one of these.",
    )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Encodes every training image and every distinct prompt, shard by shard."""
    workdir = epath.Path(workdir)
    section = config.encode.to_dict()
    batch_size = section.pop("batch_size")  # changes no shard
    settings = {"seed": config.seed, "data": config.data.to_dict()}
    settings |= {"base": config.base.to_dict(), "encode": section}
    inputs = ("caption",) if config.base.path else ("caption", "pretrain")
    stage = manifest.open_stage(workdir, "encode", settings, inputs)
    if stage.complete:
        return
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    folder = _find_base(config, workdir, stage.folder / "base.json")
    model, _ = diffusers_layout.load(folder, (), config.base.variant)
    train = splits.read_split(workdir / "caption", "train")
    texts = captions.read_captions(workdir / "caption" / "captions.jsonl", train.ids)
    rows, prompts = prompt_rows(model, train, texts, config.data)
    files.write_jsonl(stage.folder / "prompts.jsonl", rows)

    side, dtype = config.data.size // model.downsampling, section["dtype"]
    moments = shards.Writer(
        stage.folder / "moments",
        rows=len(train.images) * (2 if section["flip"] else 1),
        row_shape=(side, side, 2 * model.latent_channels),
        dtype=dtype,
    )
    states = shards.Writer(
        stage.folder / "text_states",
        rows=len(prompts),
        row_shape=(model.context_length, model.text_width),
        dtype=dtype,
    )
    _require_room(stage.folder, moments, states)
    components = ("vae", "text_encoder")
    _, params = diffusers_layout.load(folder, components, config.base.variant)
    size = sharding.padded_size(batch_size, mesh)

    def tokens(rows: range) -> np.ndarray:
        return model.tokenize(prompts[rows.start : rows.stop])

    def pixels(rows: range) -> np.ndarray:
        return image_rows(train.images, rows)

    for what, writer, function, part, inputs in (
        ("prompt", states, model.text_states, "text_encoder", tokens),
        ("image", moments, model.encode_pixels, "vae", pixels),
    ):
        encode = sharding.over_batches(
            function, {part: params[part]}, size=size, mesh=mesh
        )
        fill(writer, encode, inputs, size=size, what=what)
    logging.info("%d images, %d distinct prompts", len(train.images), len(prompts))
    stage.finish(
        ["base.json", "prompts.jsonl", *moments.names, *states.names],
        images=len(train.images),
        prompts=len(prompts),
    )


def _find_base(
    config: ConfigDict, workdir: epath.Path, record: epath.Path
) -> epath.Path:
    """The folder of the base model, looked over; which one it is goes into `record`."""
    base, revision = config.base, config.base.revision
    if record.exists():  # this stage was cut: it goes on with the same commit
        revision = files.read_json(record)["revision"] or ""
    folder, commit = checkpoint_folder.resolve(
        base.path or workdir / "pretrain" / "model", base.variant, revision
    )
    diffusers_layout.check_base(
        folder, base.variant, finetuned=base.finetuned, size=config.data.size
    )
    found = {"path": base.path, "variant": base.variant, "revision": commit}
    files.write_json(record, found)
    return folder


def image_rows(
    images: UInt8[np.ndarray, "N H W 3"], rows: range
) -> UInt8[np.ndarray, "B H W 3"]:
    """The images behind rows of the moments: from row N on, the mirror images."""
    variants, indices = np.divmod(np.asarray(rows), len(images))
    batch = images[indices]
    mirrored = variants == 1
    batch[mirrored] = batch[mirrored, :, ::-1]
    return batch


def fill(
    writer: shards.Writer,
    encode: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]],
    inputs: Callable[[range], np.ndarray],
    *,
    size: int,
    what: str,
) -> None:
    """Writes the missing shards.

    No batch runs over a shard's border, so that each shard is made of the same batches
    whatever was there before.

    Args:
      writer: of the array.
      encode: batches of inputs -> batches of rows.
      inputs: row numbers -> what to encode.
      size: of a batch.
      what: a row stands for, for the terminal.

    Raises:
      UserError: a row is not finite.
    """
    count, missing = writer.shape[0], writer.missing
    done = count - sum(len(rows) for rows in missing)
    progress = Progress(f"encode/{what}s", count, done=done, unit=what)
    with contextlib.closing(progress):
        for rows in missing:
            shard = np.empty((len(rows), *writer.shape[1:]), writer.dtype)
            starts = range(rows.start, rows.stop, size)
            spans = (range(i, min(i + size, rows.stop)) for i in starts)
            filled = 0
            for batch in encode(inputs(span) for span in spans):
                with np.errstate(over="ignore"):  # to infinity, which is refused below
                    shard[filled : filled + len(batch)] = batch
                _require_finite(shard[filled:][: len(batch)], rows[filled], what)
                filled += len(batch)
                progress.advance(len(batch))
            writer.write(rows, shard)


def prompt_rows(
    model: stable_diffusion.StableDiffusion,
    train: splits.Split,
    texts: list[str],
    data: ConfigDict,
) -> tuple[list[dict], list[str]]:
    """Prompts of the training images, and which of their tokens mixing may touch.

    Returns:
      rows `{"id", "label", "class_name", "prompt", "state", "caption_start",
      "caption_tokens", "tokens"}`: `state` indexes the distinct prompts; the caption's
      tokens are `caption_tokens` from `caption_start` on, BOS being token 0; `tokens`
      counts all with BOS and EOS.
      the distinct prompts, `""` first.
    """
    rows: list[dict] = []
    index_of = {"": 0}
    for id_, label, text in zip(train.ids, train.labels, texts, strict=True):
        name = train.class_names[label]
        prompt = captions.prompt(
            data.prompt,
            text,
            class_type=data.class_type,
            class_name=name,
            count_tokens=model.count_tokens,
            max_tokens=model.context_length,
        )
        row = {"id": id_, "label": int(label), "class_name": name}
        row |= {"prompt": prompt.text}
        row |= {"state": index_of.setdefault(prompt.text, len(index_of))}
        # Every count has BOS and EOS; the caption starts behind BOS and what is before.
        row |= {"caption_start": model.count_tokens(prompt.before) - 1}
        row |= {"caption_tokens": model.count_tokens(prompt.caption) - 2}
        rows.append(row | {"tokens": model.count_tokens(prompt.text)})
    return rows, list(index_of)


def _require_room(
    folder: epath.Path, moments: shards.Writer, states: shards.Writer
) -> None:
    parts = [
        f"{what} {'x'.join(map(str, writer.shape))} {writer.dtype}"
        for what, writer in (("moments", moments), ("text states", states))
    ]
    require_room(
        folder,
        moments.missing_bytes + states.missing_bytes,
        what=f"what is missing of the cache ({' and '.join(parts)})",
        fix="Free some or name a --workdir on another disk; "
        "--config.encode.dtype=float16 needs half.",
    )


def _require_finite(rows: np.ndarray, first: int, what: str) -> None:
    finite = np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
    if not finite.all():
        raise UserError(
            f"encode: {what} {first + int(np.argmin(finite))}",
            wanted="finite numbers from the base model",
            got=f"NaN or infinity, or more than {rows.dtype} holds",
            fix="Set --config.encode.dtype=float32; if it is, the base model's weights "
            "are damaged: download them again.",
        )
