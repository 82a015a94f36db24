"""Presets: fields that are set together, by `--config=FILE:preset=NAME[+NAME]`."""

from collections.abc import Callable, Mapping

from absl import logging
from ml_collections import ConfigDict

from mvc_jax.configs.arguments import bad_value

__all__ = ["BASES", "PRESETS", "apply_preset"]


def fast(config: ConfigDict) -> None:
    """Fewer steps of a better solver, and guidance in an interval only; our choice.

    DPM-Solver++ 2M has converged by 20 steps (arXiv 2211.01095); guidance is harmful at
    high noise levels and has little effect at low ones (arXiv 2404.07724). An image
    takes 46 evaluations of the UNet instead of 150 with the defaults. On the digits it
    costs no accuracy that three splits can show (`benchmarks/RESULTS.md`).
    """
    config.generate.sampler = "dpmpp_2m"
    config.generate.steps = min(20, config.generate.steps)
    config.generate.guidance_interval = (0.2, 0.8)


def quality(config: ConfigDict) -> None:
    """Averaged weights, twice the sampling steps, and images of their class only.

    InstructPix2Pix draws with 100 steps from an average of the weights (arXiv
    2211.09800); an average over some 1,000 steps is ours, as are the filters. What it
    brings is not measured.
    """
    config.finetune.ema_decay = 0.999
    config.generate.steps = max(100, config.generate.steps)
    config.generate.filter.label = "folds"
    config.generate.filter.outliers = True


def lowmem24(config: ConfigDict) -> None:
    """Full fine-tuning of Stable Diffusion 1.5 at 512 pixels on a card of 24 GiB.

    20.0 GiB at the paper's batch of 50 (compiled, not run; `docs/scaling.md`).
    """
    config.finetune.remat = "blocks"


def lowmem16(config: ConfigDict) -> None:
    """Adapters of Stable Diffusion 1.5 at 512 pixels on a card of 16 GiB.

    At most 10 GiB at the paper's batch of 50, and 7 to draw 8 images at once (compiled,
    not run; `docs/scaling.md`).
    """
    config.finetune.mode = "lora"
    config.finetune.remat = "blocks"
    config.generate.batch_size = min(8, config.generate.batch_size)


def small32(config: ConfigDict) -> None:
    """A small base of 32 pixels: latents 16x16x4, attention on 8x8 only.

    One core, 2026-11-30, with 39,800 images of CIFAR-10: 63 minutes, 0.37 s for an
    autoencoder's step of 32 images and 0.7 to 0.8 s for the UNet's. 200 others are
    reconstructed with 31.0 dB; a classifier of the pool takes 23 % of 100 samples for
    their class, and 40 % of the photographs.
    """
    _small(config, size=32, vae_channels=(32, 32))


def small64(config: ConfigDict) -> None:
    """A small base of 64 pixels: latents 16x16x4, attention on 8x8 only.

    Two cores, 2026-11-30: a step of 32 images takes 0.45 s for the autoencoder and 0.37
    s for the UNet of 3.9 million parameters. The loss was chosen by 180 scans of Brain
    Tumor MRI after 400 steps: 23.3 dB with absolute error alone, 23.9 with gradients
    and 0.1 of the features of a classifier, 24.3 with gradients; where the scans are
    not black 21.3, 21.8 and 22.3; sharpness 0.51, 0.59 and 0.55. After all steps, 34
    minutes by these seconds, 160 scans have 27.8 dB (25.6 where not black, sharpness
    0.72), and a classifier of the pool takes 77 % of 100 samples for their class, 89 %
    of the scans. An autoencoder of (16, 32, 32, 32) channels, whose latents are 8x8x4,
    had 22.9 dB after 1,200 steps.
    """
    _small(config, size=64, vae_channels=(16, 32, 32))


def _small(config: ConfigDict, *, size: int, vae_channels: tuple[int, ...]) -> None:
    """Architecture, loss and steps of both; learning rates decay by a cosine."""
    config.base.path = ""
    config.data.size = size
    config.caption.captioner = "attributes"
    if config.caption.attributes == "strokes":
        config.caption.attributes = "photo"
    if config.classify.size > size:
        config.classify.size = 0  # as the images
    vae, unet = config.pretrain.vae, config.pretrain.unet
    vae.channels = vae_channels
    vae.steps = 1200
    vae.batch_size = 32
    vae.gradient_weight = 1.0
    unet.channels = (64, 128)
    unet.attention_levels = 1
    unet.steps = 4000
    unet.batch_size = 32


BASES: dict[str, Callable[[ConfigDict], None]] = {
    "small32": small32,
    "small64": small64,
}
PRESETS: dict[str, Callable[[ConfigDict], None]] = {
    "fast": fast,
    "quality": quality,
    "lowmem16": lowmem16,
    "lowmem24": lowmem24,
}


def apply_preset(config: ConfigDict, given: Mapping[str, str]) -> ConfigDict:
    """Applies the base and the presets of a parsed argument; logs what they change.

    Raises:
      UserError: there is no such base or preset.
    """
    applied = False
    for key, known, several in (("pretrain", BASES, False), ("preset", PRESETS, True)):
        names = given[key].split("+") if key in given else []
        if not {*names} <= known.keys() or (len(names) > 1 and not several):
            more = ", several with + between them" if several else ""
            wanted = f"{key}={' or '.join(known)}{more}"
            raise bad_value(given, key, wanted)
        for name in names:
            before = _leaves(config)
            known[name](config)
            after = _leaves(config)
            changed = [f"{k}={v}" for k, v in after.items() if v != before[k]]
            logging.info(
                "%s %s: %s",
                key,
                name,
                ", ".join(changed) or "changes nothing of this config",
            )
            applied = True
    if applied:
        logging.info(
            "flags, as --config.generate.steps=30, override what a preset sets"
        )
    return config


def _leaves(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted name of each field -> its value."""
    found: dict[str, object] = {}
    for key, value in config.items():
        inner = isinstance(value, ConfigDict)
        found |= _leaves(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found
