"""Images, captions -> VAE moments and text states: computed once, read many times.

Reads: the base model, training images, captions. Writes: `moments.npy` [N, h, w, 2c],
`text_states.npy` [P, L, D] of the distinct prompts, the empty one first,
`prompts.jsonl`, a row for each training image, and `base.json`, which base model that
was, so that later stages read the same.
"""

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.data import captions, manifest, splits
from mvc_jax.errors import require
from mvc_jax.models import checkpoint_folder, diffusers_layout, stable_diffusion
from mvc_jax.training import sharding


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


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Encodes every training image and every distinct prompt."""
    workdir = epath.Path(workdir)
    settings = {"seed": config.seed, "data": config.data.to_dict()}
    settings |= {"base": config.base.to_dict()}
    inputs = ("caption",) if config.base.path else ("caption", "pretrain")
    stage = manifest.open_stage(workdir, "encode", settings, inputs)
    if stage.complete:
        return
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    folder = _find_base(config, workdir, stage.folder / "base.json")
    components = ("vae", "text_encoder")
    model, params = diffusers_layout.load(folder, components, config.base.variant)
    train = splits.read_split(workdir / "caption", "train")
    texts = captions.read_captions(workdir / "caption" / "captions.jsonl", train.ids)

    rows, prompts = prompt_rows(model, train, texts, config.data)
    files.write_jsonl(stage.folder / "prompts.jsonl", rows)
    ids = model.tokenize(prompts)
    states = jax.jit(model.text_states)(params, ids)
    files.write_array(stage.folder / "text_states.npy", np.asarray(states))

    moments = stable_diffusion.encode_images(
        model, params, train.images, batch_size=config.encode.batch_size, mesh=mesh
    )
    files.write_array(stage.folder / "moments.npy", moments)
    logging.info("%d images, %d distinct prompts", len(moments), len(prompts))
    stage.finish(
        ["base.json", "prompts.jsonl", "text_states.npy", "moments.npy"],
        images=len(moments),
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
