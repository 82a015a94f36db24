"""Images, captions -> a small Stable Diffusion, where no base model is given.

Reads: the base pool and its captions. Writes: `model/`, a folder in the diffusers
layout that later stages load exactly as they load a downloaded base: tokenizer,
autoencoder, text encoder and text-to-image UNet. Where their steps are not 0, also the
companions for the ablation: `model/image_encoder/` and `controlnet/`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import files, processes
from mvc_jax.data import captions, splits, time_ids
from mvc_jax.errors import UserError, require_at_most
from mvc_jax.stage import Part, Spec, differences, open_stage, read_manifest
from mvc_jax.work import BaseSizes, Sizes, Work

with epy.lazy_imports():
    from mvc_jax.checkpoints import (
        base_sizes,
        clip_checkpoint,
        clip_tokenizer,
        controlnet_checkpoint,
        diffusers_layout,
    )
    from mvc_jax.models import stable_diffusion
    from mvc_jax.pretraining import base, companions, small, tokenizer
    from mvc_jax.training import checkpoint, sharding, train_logger

_KEPT = 2  # checkpoints of each network
_COMPANIONS = ("image_encoder", "controlnet")
_NETWORKS = ("vae", "unet", *_COMPANIONS)
_OF_PROMPTS = ("prompt", "class_type")  # fields of `data`


def check(config: ConfigDict) -> None:
    """Checks the section `pretrain`."""
    section = config.pretrain
    vae, unet, tower = section.vae, section.unet, section.image_encoder
    require_at_most("config.pretrain.unet", unet.to_dict(), "warmup", "steps")
    _check_heads("text", (section.text.width,), section.text.heads)
    _check_heads("unet", unet.channels, unet.heads)
    halvings = len(vae.channels) - 1 + len(unet.channels) - 1
    if config.data.size % 2**halvings:
        raise UserError(
            "config.data.size",
            wanted=f"a multiple of {2**halvings} (autoencoder and UNet halve it "
            f"{halvings} times)",
            got=f"{config.data.size}",
            fix="Round it.",
        )
    for name, channels, groups in (
        ("vae", vae.channels, vae.groups),
        ("unet", unet.channels, 32),
    ):
        if any(c % groups for c in channels):
            raise UserError(
                f"config.pretrain.{name}.channels",
                wanted=f"multiples of {groups}, the groups of its normalisation",
                got=f"{tuple(channels)}",
                fix="Round them.",
            )
    if config.data.size % tower.patch or tower.width % tower.heads:
        raise UserError(
            "config.pretrain.image_encoder",
            wanted=f"a patch that divides data.size={config.data.size}, and heads that "
            "divide the width",
            got=f"patch={tower.patch}, heads={tower.heads}, width={tower.width}",
            fix="Round them.",
        )
    companions = [name for name in _COMPANIONS if section[name].steps]
    if section.family == "sdxl" and companions:
        raise UserError(
            f"config.pretrain.{companions[0]}.steps",
            wanted="0 with config.pretrain.family=sdxl, which has no companions",
            got=f"{section[companions[0]].steps}",
            fix="Leave out the argument `ablation`, or set "
            "--config.pretrain.family=sd.",
        )
    if config.data.pool <= 0:
        raise UserError(
            "config.data.pool",
            wanted="images to train a base model on",
            got=f"{config.data.pool}",
            fix="Raise it, or name a model folder in config.base.path.",
        )


def _check_heads(name: str, widths: Sequence[int], heads: int) -> None:
    """Checks that attention of every width can be split into heads."""
    if any(width % heads for width in widths):
        raise UserError(
            f"config.pretrain.{name}.heads",
            wanted=f"a divisor of the width {', '.join(map(str, widths))}",
            got=f"{heads}",
            fix="4 is typical.",
        )


def base_of(config: ConfigDict) -> BaseSizes:
    """Sizes of the base model that `run` trains; starts no JAX backend."""
    vocab_size = config.pretrain.vocab_size
    configs = small.configs(vocab_size=vocab_size, **_architecture(config))
    model = stable_diffusion.StableDiffusion(configs, None)
    parameters = {name: model.count_parameters(name) for name in model.components}
    return base_sizes.of_configs(configs, parameters, name="the small base")


def price(config: ConfigDict, sizes: Sizes) -> Work:
    """What there is to train; the companions' networks are not in the bytes."""
    section, side, base = config.pretrain, config.data.size, sizes.base
    count, vae, unet = base.parameters, section.vae, section.unet
    loops = {f"{name} steps": section[name].steps for name in _NETWORKS}
    denoiser = sum(count.values()) - count["vae"]
    # Weights and two moments; of the UNet an average too.
    saved = 4 * (3 * count["vae"] + 4 * denoiser)
    moments = sizes.pool * 4 * math.prod(base.moments_shape(side))
    of_unet = {
        "weights, moments, average and gradients": 4 * 5 * denoiser,
        "a batch of the UNet": unet.batch_size * base.unet_bytes(side, remat="none"),
    }
    of_vae = {
        "weights, moments and gradients": 4 * 4 * count["vae"],
        "a batch of images": 4 * vae.batch_size * 8 * base.vae_channels * side**2,
    }
    return Work(
        {"steps": sum(loops.values()), **{k: v for k, v in loops.items() if v}},
        unit="steps",
        speed={"pretrain": section.to_dict(), "size": side},
        on_devices=True,
        disk={
            "checkpoints": _KEPT * saved,
            "model": 4 * sum(count.values()),
        },
        asks=saved,
        leaves=4 * sum(count.values()),
        host={"moments of the pool": moments},
        devices=max(of_unet, of_vae, key=lambda found: sum(found.values())),
        lower=("pretrain.unet.batch_size", "pretrain.vae.batch_size"),
    )


def stage_spec(config: ConfigDict) -> Spec:
    """What the base model depends on."""
    settings = {
        "seed": config.seed,
        "data": config.data.to_dict(),
        "pretrain": config.pretrain.to_dict(),
    }
    return Spec("pretrain", settings, inputs=("caption",))


def parts(
    config: ConfigDict, workdir: epath.PathLike, other: epath.PathLike
) -> list[Part]:
    """The trained networks of another workdir whose pool is the same.

    Another `data.per_class` leaves it as it is, so that only exports are made again.
    """
    ours = stage_spec(config).settings
    theirs = read_manifest(other, "pretrain")["settings"]
    same_words = all(ours["data"][x] == theirs["data"][x] for x in _OF_PROMPTS)
    if ours["seed"] != theirs["seed"] or not same_words:
        return []
    pools = [_read_pool(folder) for folder in (workdir, other)]
    texts = [(p.ids, p.class_names, t) for p, t in pools]
    (mine, _), (their, _) = pools
    same_labels = np.array_equal(mine.labels, their.labels)
    if texts[0] != texts[1] or not same_labels:
        return []
    if not np.array_equal(mine.images, their.images):
        return []
    if not differences(ours["pretrain"], theirs["pretrain"], "pretrain"):
        names = [name for name in _NETWORKS if config.pretrain[name].steps]
    elif not differences(
        ours["pretrain"]["vae"], theirs["pretrain"]["vae"], "pretrain.vae"
    ):
        names = ["vae"]  # which is trained first, by itself
    else:
        names = []
    return [Part(name, (f"checkpoints/{name}",)) for name in names]


def _read_pool(workdir: epath.PathLike) -> tuple[splits.Split, list[str]]:
    """The images of the pool and their captions."""
    folder = epath.Path(workdir) / "caption"
    pool = splits.read_split(folder, "pool")
    return pool, captions.read_captions(folder / "captions.jsonl", pool.ids)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains the base model on the pool and writes it."""
    stage = open_stage(workdir, stage_spec(config))
    if stage.complete:
        return
    seed, section = config.seed, config.pretrain
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)

    def loop(name: str) -> base.Loop:
        folder = stage.folder / "checkpoints" / name
        every, log_every = section.checkpoint_every, section.log_every
        return base.Loop(
            mesh,
            section[name].steps,
            checkpoint.Checkpoints(folder, every=every, keep=_KEPT),
            train_logger.TrainLogger(workdir, f"pretrain/{name}", log_every=log_every),
        )

    pool, texts = _read_pool(workdir)
    names = [pool.class_names[label] for label in pool.labels]
    words = {"template": config.data.prompt, "class_type": config.data.class_type}
    folder = stage.folder / "model"

    def train_tokenizers() -> None:
        for part, pad_token in _tokenizers(config).items():
            tokenizer.train(
                folder / part,
                base.tokenizer_corpus(texts, names, **words),
                vocab_size=section.vocab_size,
                max_length=section.context_length,
                pad_token=pad_token,
            )

    processes.on_first("the tokenizer", train_tokenizers)
    model = _new_model(config, folder)
    prompts = base.prompts(model, texts, names, **words)

    vae = base.train_vae(
        model,
        pool.images,
        seed=seed,
        loop=loop("vae"),
        batch_size=section.vae.batch_size,
        learning_rate=section.vae.learning_rate,
        kl_weight=section.vae.kl_weight,
    )
    moments = base.encode(
        model, vae, pool.images, batch_size=config.encode.batch_size, mesh=mesh
    )
    model = base.with_scaling_factor(model, moments)
    params = base.train_unet(
        model,
        moments,
        model.tokenize(prompts),
        time_ids=_time_ids(config, workdir) if model.pooled_width else None,
        seed=seed,
        loop=loop("unet"),
        batch_size=section.unet.batch_size,
        learning_rate=section.unet.learning_rate,
        warmup=section.unet.warmup,
        drop_rate=section.unet.drop_rate,
        ema_decay=section.unet.ema_decay,
    )

    artifacts, index = [], {}
    data = companions.Pool(pool.images, moments, tuple(prompts))
    if section.image_encoder.steps:
        tower = companions.train_image_encoder(
            model,
            params,
            data,
            seed=seed,
            loop=loop("image_encoder"),
            batch_size=section.image_encoder.batch_size,
            learning_rate=section.image_encoder.learning_rate,
            patch=section.image_encoder.patch,
            width=section.image_encoder.width,
            layers=section.image_encoder.layers,
            heads=section.image_encoder.heads,
        )
        written = processes.on_first(
            "the image encoder", lambda: clip_checkpoint.save(folder, *tower)
        )
        artifacts += [f"model/{file}" for file in written]
        index = clip_checkpoint.INDEX_ENTRIES
    if section.controlnet.steps:
        control = companions.train_controlnet(
            model,
            params,
            data,
            seed=seed,
            loop=loop("controlnet"),
            batch_size=section.controlnet.batch_size,
            learning_rate=section.controlnet.learning_rate,
            drop_rate=section.controlnet.drop_rate,
        )
        written = processes.on_first(
            "the ControlNet",
            lambda: controlnet_checkpoint.save(stage.folder / "controlnet", *control),
        )
        artifacts += [f"controlnet/{file}" for file in written]
    written = processes.on_first(
        "the model",
        lambda: diffusers_layout.save(
            folder, model, {"vae": vae, **params}, index_entries=index
        ),
    )
    artifacts += [f"model/{file}" for file in written]
    stage.finish(artifacts, images=len(pool.ids))


def _time_ids(config: ConfigDict, workdir: epath.PathLike) -> np.ndarray:
    """The sizes of the pool's images, as XL is given them."""
    rows = files.read_jsonl(epath.Path(workdir) / "caption" / "images.jsonl")
    rows = [row for row in rows if row["split"] == "pool"]
    return time_ids.time_ids(rows, config.data.size, resize=config.data.resize)


def _new_model(
    config: ConfigDict, folder: epath.Path
) -> stable_diffusion.StableDiffusion:
    """The architecture of the config, without weights; its tokenizers are there."""
    read = [clip_tokenizer.read(folder / part)[0] for part in _tokenizers(config)]
    return small.stable_diffusion(*read, **_architecture(config))


def _tokenizers(config: ConfigDict) -> dict[str, str]:
    """The folders of the tokenizers, and the token with which each pads."""
    found = {"tokenizer": tokenizer.EOS}
    if config.pretrain.family == "sdxl":
        found["tokenizer_2"] = small.SECOND_PAD
    return found


def _architecture(config: ConfigDict) -> dict[str, Any]:
    """The fields of `small.configs`."""
    section = config.pretrain
    return {
        "size": config.data.size,
        "context_length": section.context_length,
        "vae_channels": section.vae.channels,
        "vae_groups": section.vae.groups,
        "unet_channels": section.unet.channels,
        "unet_layers": section.unet.layers,
        "unet_heads": section.unet.heads,
        "text_width": section.text.width,
        "text_layers": section.text.layers,
        "text_heads": section.text.heads,
        "family": section.family,
    }
