"""Images, captions -> a small Stable Diffusion, where no base model is given.

Reads: the base pool and its captions. Writes: `model/`, a folder in the diffusers
layout that later stages load exactly as they load a downloaded base: tokenizer,
autoencoder, text encoder, text-to-image UNet and a card. Where their steps are not 0,
also the companions for the ablation: `model/image_encoder/` and `controlnet/`. What is
known of the base is in `quality.json`, `reconstructions.png` and `samples.png`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import files, processes
from mvc_jax.data import base_pool, captions, splits, time_ids
from mvc_jax.errors import UserError, require_at_most
from mvc_jax.stage import Part, Spec, differences, open_stage, read_manifest
from mvc_jax.work import BaseSizes, Sizes, Work

with epy.lazy_imports():
    from mvc_jax.checkpoints import (
        base_card,
        base_sizes,
        classifier_checkpoint,
        clip_checkpoint,
        clip_tokenizer,
        controlnet_checkpoint,
        diffusers_layout,
    )
    from mvc_jax.classification import judge
    from mvc_jax.models import stable_diffusion
    from mvc_jax.pretraining import (
        base,
        companions,
        quality,
        reconstruction,
        small,
        tokenizer,
    )
    from mvc_jax.training import checkpoint, sharding, train_logger

_KEPT = 2  # checkpoints of each network
_COMPANIONS = ("image_encoder", "controlnet")
_NETWORKS = ("judge", "vae", "unet", *_COMPANIONS)
_GUESSED_LENGTH = 16  # of prompts, before there is a tokenizer
_FEATURES = "config.pretrain.vae.features"
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
    levels = len(unet.channels)
    require_at_most(
        "config.pretrain.unet", {**unet, "levels": levels}, "attention_levels", "levels"
    )
    if config.data.pool <= 0 and not section.source:
        raise UserError(
            "config.data.pool",
            wanted="images to train a base model on",
            got=f"{config.data.pool}",
            fix="Raise it, or name other images in config.pretrain.source, or a model "
            "folder in config.base.path.",
        )
    if vae.features:
        classifier_checkpoint.check(vae.features, field=_FEATURES)
    if vae.feature_weight and not vae.features and not section.judge.steps:
        raise UserError(
            _FEATURES,
            wanted="a classifier, whose features are in the loss by "
            "config.pretrain.vae.feature_weight",
            got="none, and pretrain.judge.steps is 0",
            fix="Name one, or set --config.pretrain.judge.steps=300.",
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
    length = config.pretrain.context_length or _GUESSED_LENGTH
    configs = small.configs(vocab_size=vocab_size, **_architecture(config, length))
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
        "seed": _seed(config),
        "data": config.data.to_dict(),
        "pretrain": config.pretrain.to_dict(),
    }
    return Spec("pretrain", settings, inputs=("caption",))


def _seed(config: ConfigDict) -> int:
    return base_pool.seed_of(config.seed, config.pretrain.seed)


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
    if "held_out" not in theirs["pretrain"]:  # by a version that held out none
        return []
    pools = [
        _read_pool(epath.Path(folder) / "caption", each["pretrain"].get("source", ""))
        for folder, each in ((workdir, ours), (other, theirs))
    ]
    texts = [(p.ids, p.class_names, t) for p, t in pools]
    (mine, _), (their, _) = pools
    same_labels = np.array_equal(mine.labels, their.labels)
    if texts[0] != texts[1] or not same_labels:
        return []
    if not np.array_equal(mine.images, their.images):
        return []
    # Without a length of its own, that of the prompts depends on the training images.
    same_length = config.pretrain.context_length or (
        _train_captions(workdir) == _train_captions(other)
    )
    same = not differences(ours["pretrain"], theirs["pretrain"], "pretrain")
    if same and same_length:
        names = [name for name in _NETWORKS if config.pretrain[name].steps]
    elif not differences(_of_vae(ours), _of_vae(theirs), "pretrain"):
        names = ["judge", "vae"]  # which are trained first, by themselves
    else:
        names = []
    return [Part(name, (f"checkpoints/{name}",)) for name in names]


def _train_captions(workdir: epath.PathLike) -> list[str]:
    """The captions of the training images."""
    folder = epath.Path(workdir) / "caption"
    ids = splits.read_split(folder, "train").ids
    return captions.read_captions(folder / "captions.jsonl", ids)


def _of_vae(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings on which judge and autoencoder depend, if the pool is the same."""
    names = ("vae", "judge", "held_out")
    return {k: v for k, v in settings["pretrain"].items() if k in names}


def _read_pool(folder: epath.Path, source: str) -> tuple[splits.Split, list[str]]:
    """The images of the pool and their captions, from the folder of `caption`.

    Args:
      folder: of `caption`.
      source: `pretrain.source`.
    """
    folder = folder / base_pool.FOLDER if source else folder
    pool = splits.read_split(folder, "pool")
    return pool, captions.read_captions(folder / "captions.jsonl", pool.ids)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains the base model on the pool and writes it."""
    workdir = epath.Path(workdir)
    stage = open_stage(workdir, stage_spec(config))
    if stage.complete:
        return
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    loop = functools.partial(_loop, config.pretrain, workdir, stage.folder, mesh)
    folder = stage.folder / "model"
    model, pool = _tokenized(config, workdir, folder)

    judge_ = _train_judge(config, pool, loop)
    vae = _train_vae(config, model, pool, judge_, loop)
    reconstruct = functools.partial(
        base.reconstruct, model, vae, batch_size=config.encode.batch_size, mesh=mesh
    )
    decoded = reconstruct(pool.held_out)
    to_augment = None
    if config.pretrain.source:
        images = splits.read_split(workdir / "caption", "train").images
        images = images[quality.spread(len(images))]
        to_augment = (reconstruct(images), images)
    moments = base.encode(
        model, vae, pool.images, batch_size=config.encode.batch_size, mesh=mesh
    )
    model = base.with_scaling_factor(model, moments)
    section = config.pretrain.unet
    params = base.train_unet(
        model,
        moments,
        model.tokenize(pool.prompts),
        time_ids=pool.time_ids,
        seed=_seed(config),
        loop=loop("unet"),
        batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        warmup=section.warmup,
        drop_rate=section.drop_rate,
        ema_decay=section.ema_decay,
    )
    params = {"vae": vae, **params}
    found, written = _assess(
        config, stage.folder, model, params, pool, judge_, decoded, to_augment
    )
    made, index = _train_companions(
        config, stage.folder, model, params, pool, moments, loop
    )
    artifacts = [*written, *made]

    def save() -> list[str]:
        files_ = diffusers_layout.save(folder, model, params, index_entries=index)
        return files_ + base_card.write(folder, _facts(config, workdir, pool, found))

    artifacts += [f"model/{x}" for x in processes.on_first("the model", save)]
    stage.finish(artifacts, images=len(pool.images) + len(pool.held_out))


def _loop(
    section: ConfigDict,
    workdir: epath.Path,
    folder: epath.Path,
    mesh: Any,
    name: str,
) -> base.Loop:
    """The training loop of a network."""
    every, log_every = section.checkpoint_every, section.log_every
    return base.Loop(
        mesh,
        section[name].steps,
        checkpoint.Checkpoints(folder / "checkpoints" / name, every=every, keep=_KEPT),
        train_logger.TrainLogger(workdir, f"pretrain/{name}", log_every=log_every),
    )


def _tokenized(
    config: ConfigDict, workdir: epath.Path, folder: epath.Path
) -> tuple[stable_diffusion.StableDiffusion, quality.Pool]:
    """Trains the tokenizers; returns the architecture without weights, and the pool."""
    section, caption = config.pretrain, workdir / "caption"
    pool, texts = _read_pool(caption, section.source)
    names = [pool.class_names[label] for label in pool.labels]
    class_type = section.pool.class_type if section.source else config.data.class_type
    words = {"template": config.data.prompt, "class_type": class_type}

    tokenizers = _tokenizers(section)

    def train_tokenizers() -> int:
        for part, pad_token in tokenizers.items():
            tokenizer.train(
                folder / part,
                base.tokenizer_corpus(texts, names, **words),
                vocab_size=section.vocab_size,
                max_length=section.context_length or captions.LONGEST,
                pad_token=pad_token,
            )
        length = section.context_length
        if not length:
            train = splits.read_split(caption, "train")
            others = captions.read_captions(caption / "captions.jsonl", train.ids)
            length = tokenizer.longest(
                clip_tokenizer.read(folder / "tokenizer")[0],
                [
                    *base.whole_prompts(texts, names, **words),
                    *base.whole_prompts(
                        others,
                        [train.class_names[label] for label in train.labels],
                        template=config.data.prompt,
                        class_type=config.data.class_type,
                    ),
                ],
                most=captions.LONGEST,
            )
            for part in tokenizers:
                tokenizer.set_length(folder / part, length)
        return length

    length = processes.on_first("the tokenizer", train_tokenizers)
    read = [clip_tokenizer.read(folder / part)[0] for part in tokenizers]
    model = small.stable_diffusion(*read, **_architecture(config, length))
    prompts = base.prompts(model, texts, names, **words)
    kept, held = quality.hold_out(len(pool.ids), section.held_out, seed=_seed(config))
    return model, quality.Pool(
        images=pool.images[kept] if len(held) else pool.images,
        labels=pool.labels[kept],
        prompts=[prompts[i] for i in kept],
        held_out=pool.images[held],
        held_labels=pool.labels[held],
        class_names=pool.class_names,
        grey=pool.grey,
        time_ids=_pool_time_ids(config, caption)[kept] if model.pooled_width else None,
    )


def _train_judge(
    config: ConfigDict, pool: quality.Pool, loop: Callable[[str], base.Loop]
) -> judge.Judge | None:
    """The classifier of the pool; None: there is none, or only one class."""
    section = config.pretrain.judge
    if not section.steps or len(np.unique(pool.labels)) < 2:
        return None
    return judge.train(
        pool.images,
        pool.labels,
        classes=len(pool.class_names),
        seed=_seed(config),
        loop=loop("judge"),
        width=section.width,
        batch_size=section.batch_size,
        learning_rate=section.learning_rate,
    )


def _train_vae(
    config: ConfigDict,
    model: stable_diffusion.StableDiffusion,
    pool: quality.Pool,
    judge_: judge.Judge | None,
    loop: Callable[[str], base.Loop],
) -> Any:
    """The trained autoencoder's parameters."""
    section = config.pretrain.vae
    maps = variables = None
    if section.feature_weight and section.features:
        maps, variables = judge.read_maps(section.features, field=_FEATURES)
    elif section.feature_weight and judge_ is not None:
        maps, variables = judge_.maps, judge_.variables
    return base.train_vae(
        model,
        pool.images,
        seed=_seed(config),
        loop=loop("vae"),
        batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        kl_weight=section.kl_weight,
        reconstruction=reconstruction.ReconstructionLoss(
            section.gradient_weight, section.feature_weight, maps
        ),
        variables=variables,
    )


def _assess(
    config: ConfigDict,
    folder: epath.Path,
    model: stable_diffusion.StableDiffusion,
    params: dict[str, Any],
    pool: quality.Pool,
    judge_: judge.Judge | None,
    decoded: np.ndarray,
    to_augment: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[quality.Quality, list[str]]:
    """Measures the base; writes and logs what is found.

    Returns:
      the measures, and the files written.
    """
    found, written = quality.measure(
        model,
        params,
        pool,
        judge_,
        decoded,
        samples_drawn=config.pretrain.judge.samples,
        seed=_seed(config),
        to_augment=to_augment,
    )

    def write() -> None:
        for name, content in written.items():
            files.write_bytes(folder / name, content)
        files.write_json(folder / quality.FILE, found.as_dict())

    processes.on_first("the base's measures", write)
    for sentence in found.in_words():
        logging.info("%s", sentence)
    for sentence in found.warnings():
        logging.warning("%s", sentence)
    return found, [*written, quality.FILE]


def _train_companions(
    config: ConfigDict,
    folder: epath.Path,
    model: stable_diffusion.StableDiffusion,
    params: dict[str, Any],
    pool: quality.Pool,
    moments: np.ndarray,
    loop: Callable[[str], base.Loop],
) -> tuple[list[str], dict[str, list[str]]]:
    """Trains and writes what was asked for beside the base.

    Returns:
      the files written, and entries of the model's index.
    """
    section, artifacts, index = config.pretrain, [], {}
    data = companions.Pool(pool.images, moments, tuple(pool.prompts))
    if section.image_encoder.steps:
        tower = companions.train_image_encoder(
            model,
            params,
            data,
            seed=_seed(config),
            loop=loop("image_encoder"),
            batch_size=section.image_encoder.batch_size,
            learning_rate=section.image_encoder.learning_rate,
            patch=section.image_encoder.patch,
            width=section.image_encoder.width,
            layers=section.image_encoder.layers,
            heads=section.image_encoder.heads,
        )
        written = processes.on_first(
            "the image encoder", lambda: clip_checkpoint.save(folder / "model", *tower)
        )
        artifacts += [f"model/{file}" for file in written]
        index = clip_checkpoint.INDEX_ENTRIES
    if section.controlnet.steps:
        control = companions.train_controlnet(
            model,
            params,
            data,
            seed=_seed(config),
            loop=loop("controlnet"),
            batch_size=section.controlnet.batch_size,
            learning_rate=section.controlnet.learning_rate,
            drop_rate=section.controlnet.drop_rate,
        )
        written = processes.on_first(
            "the ControlNet",
            lambda: controlnet_checkpoint.save(folder / "controlnet", *control),
        )
        artifacts += [f"controlnet/{file}" for file in written]
    return artifacts, index


def _facts(
    config: ConfigDict, workdir: epath.Path, pool: quality.Pool, found: quality.Quality
) -> base_card.Facts:
    """What the card of the base says."""
    section, folder = config.pretrain, workdir / "caption"
    if section.source:
        folder = folder / base_pool.FOLDER
    captioner = section.pool.captioner if section.source else ""
    return base_card.Facts(
        dataset=files.read_json(folder / "dataset.json")["name"],
        classes=pool.class_names,
        images=len(pool.images),
        resolution=config.data.size,
        captioner=captioner or config.caption.captioner,
        prompt=pool.prompts[0],
        steps={name: section[name].steps for name in ("vae", "unet")},
        measures=found.as_dict(),
    )


def _pool_time_ids(config: ConfigDict, caption: epath.Path) -> np.ndarray:
    """The sizes of the pool's images, as XL is given them."""
    folder = caption / base_pool.FOLDER if config.pretrain.source else caption
    rows = files.read_jsonl(folder / "images.jsonl")
    rows = [row for row in rows if row["split"] == "pool"]
    return time_ids.time_ids(rows, config.data.size, resize=config.data.resize)


def _tokenizers(section: ConfigDict) -> dict[str, str]:
    """The folders of the tokenizers, and the token with which each pads."""
    found = {"tokenizer": tokenizer.EOS}
    if section.family == "sdxl":
        found["tokenizer_2"] = small.SECOND_PAD
    return found


def _architecture(config: ConfigDict, length: int) -> dict[str, Any]:
    """The fields of `small.configs`, for prompts of `length` tokens."""
    section = config.pretrain
    return {
        "size": config.data.size,
        "context_length": length,
        "vae_channels": section.vae.channels,
        "vae_groups": section.vae.groups,
        "unet_channels": section.unet.channels,
        "unet_layers": section.unet.layers,
        "unet_heads": section.unet.heads,
        "unet_attention_levels": section.unet.attention_levels,
        "text_width": section.text.width,
        "text_layers": section.text.layers,
        "text_heads": section.text.heads,
        "family": section.family,
    }
