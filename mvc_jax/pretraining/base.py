"""The small base, trained from scratch: autoencoder, then UNet with text encoder.

Legend: B batch, H W pixels, h w latent grid, c latent channels, L tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8

from mvc_jax.data import captions, order
from mvc_jax.diffusion import loss
from mvc_jax.models.stable_diffusion import (
    Params,
    StableDiffusion,
    random_params,
    to_pixels,
)
from mvc_jax.pretraining.reconstruction import ReconstructionLoss
from mvc_jax.training import optim, rng, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.loop import TrainState, create_state, fit, weighted_mean
from mvc_jax.training.train_logger import TrainLogger


@dataclasses.dataclass(frozen=True)
class Loop:
    """The arguments of `training.loop.fit` that do not depend on the network.

    Attributes:
      mesh: the devices.
      steps: optimiser steps.
      checkpoints: of this network.
      logger: of this network.
    """

    mesh: Mesh
    steps: int
    checkpoints: Checkpoints
    logger: TrainLogger

    def fit(
        self,
        train_step: Callable,
        state: TrainState,
        *,
        read: Callable[[int], dict[str, np.ndarray]],
        constants: dict[str, Any],
    ) -> TrainState:
        """Runs `train_step` to the last step, from the newest checkpoint if any."""
        return fit(
            train_step,
            state,
            read=read,
            constants=constants,
            mesh=self.mesh,
            steps=self.steps,
            checkpoints=self.checkpoints,
            logger=self.logger,
        )

    def warmup_cosine(self, peak: float, warmup: int | None = None) -> optax.Schedule:
        """A learning rate for all steps; the default warm-up is a twentieth of them."""
        warmup = self.steps // 20 if warmup is None else warmup
        return optim.warmup_cosine(peak, warmup=warmup, steps=self.steps)


def tokenizer_corpus(
    texts: Sequence[str], names: Sequence[str], *, template: str, class_type: str
) -> list[str]:
    """The captions, and each image's prompt without its caption.

    Args:
      texts: captions of the images.
      names: of their classes.
      template: of the prompts.
      class_type: in the prompts.
    """
    words = {"template": template, "class_type": class_type}
    return [*texts, *whole_prompts([""] * len(names), names, **words)]


def whole_prompts(
    texts: Sequence[str], names: Sequence[str], *, template: str, class_type: str
) -> list[str]:
    """The prompt of each image, not truncated; the arguments are those of `prompts`."""
    return [
        captions.fill(template, text, class_type=class_type, class_name=name).text
        for text, name in zip(texts, names, strict=True)
    ]


def prompts(
    model: StableDiffusion,
    texts: Sequence[str],
    names: Sequence[str],
    *,
    template: str,
    class_type: str,
) -> list[str]:
    """The prompt of each image, its caption truncated to the model's context length.

    Args:
      model: the base.
      texts: captions of the images.
      names: of their classes.
      template: of the prompts.
      class_type: in the prompts.
    """
    return [
        captions.prompt(
            template,
            text,
            class_type=class_type,
            class_name=name,
            count_tokens=model.count_tokens,
            max_tokens=model.context_length,
        ).text
        for text, name in zip(texts, names, strict=True)
    ]


def train_vae(
    model: StableDiffusion,
    images: UInt8[np.ndarray, "N H W 3"],
    *,
    seed: int,
    loop: Loop,
    batch_size: int,
    learning_rate: float,
    kl_weight: float,
    reconstruction: ReconstructionLoss,
    variables: Any = None,
) -> Params:
    """Trains the autoencoder; returns its host parameters.

    Args:
      model: the base.
      images: of the pool.
      seed: of the run.
      loop: the loop of the autoencoder.
      batch_size: images per step.
      learning_rate: its peak.
      kl_weight: of the KL term.
      reconstruction: the loss of the reconstructions.
      variables: of its feature maps.
    """
    purpose = "pretrain/vae"
    tx = optim.adam(loop.warmup_cosine(learning_rate), max_norm=1.0)
    params = random_params(
        model.shapes("vae"), order.generator(seed, f"{purpose}/init")
    )
    train_step = functools.partial(
        vae_step,
        model=model,
        tx=tx,
        key=rng.purpose_key(seed, purpose),
        kl_weight=kl_weight,
        reconstruction=reconstruction,
    )
    state = loop.fit(
        train_step,
        create_state(params, tx, loop.mesh),
        read=order.reader(seed, purpose, {"images": images}, batch_size=batch_size),
        constants={} if variables is None else {"features": variables},
    )
    return sharding.to_host(state.params)


def train_unet(
    model: StableDiffusion,
    moments: Float[np.ndarray, "N h w c2"],
    ids: Int[np.ndarray, "N *E L"],
    *,
    time_ids: Int[np.ndarray, "N 6"] | None = None,
    seed: int,
    loop: Loop,
    batch_size: int,
    learning_rate: float,
    warmup: int,
    drop_rate: float,
    ema_decay: float,
) -> dict[str, Params]:
    """Trains UNet and text encoder together.

    Args:
      model: the base, with its scaling factor.
      moments: of the pool's images.
      ids: tokens of their prompts.
      time_ids: of XL, sizes of the images (`data/time_ids.py`).
      seed: of the run.
      loop: the loop of both networks.
      batch_size: images per step.
      learning_rate: its peak.
      warmup: steps until the peak.
      drop_rate: fraction of the prompts that is replaced by the empty one.
      ema_decay: of the averaged parameters.

    Returns:
      averaged host parameters of the text encoders and `unet`.
    """
    purpose = "pretrain/unet"
    tx = optim.adam(loop.warmup_cosine(learning_rate, warmup))
    init = order.generator(seed, f"{purpose}/init")
    params = {
        name: random_params(model.shapes(name), init)
        for name in (*model.text_encoders, "unet")
    }
    train_step = functools.partial(
        unet_step,
        model=dataclasses.replace(model, mesh=loop.mesh),
        tx=tx,
        key=rng.purpose_key(seed, purpose),
        drop_rate=drop_rate,
        ema_decay=ema_decay,
    )
    arrays = {"moments": moments, "ids": ids}
    if time_ids is not None:
        arrays["time_ids"] = time_ids
    state = loop.fit(
        train_step,
        create_state(params, tx, loop.mesh, ema=True),
        read=order.reader(seed, purpose, arrays, batch_size=batch_size),
        constants={"null_ids": model.tokenize([""])},
    )
    return sharding.to_host(state.averaged)


def encode(
    model: StableDiffusion,
    vae: Params,
    images: UInt8[np.ndarray, "N H W 3"],
    *,
    batch_size: int,
    mesh: Mesh,
) -> Float[np.ndarray, "N h w c2"]:
    """Moments of images, from the parameters `vae`."""
    size = sharding.padded_size(batch_size, mesh)
    encode_pixels = dataclasses.replace(model, mesh=mesh).encode_pixels
    run = sharding.over_batches(encode_pixels, {"vae": vae}, size=size, mesh=mesh)
    starts = range(0, len(images), size)
    return np.concatenate([*run(images[i : i + size] for i in starts)])


def reconstruct(
    model: StableDiffusion,
    vae: Params,
    images: UInt8[np.ndarray, "N H W 3"],
    *,
    batch_size: int,
    mesh: Mesh,
) -> UInt8[np.ndarray, "N H W 3"]:
    """Images decoded from the modes of their posteriors, before latents are scaled."""
    if not len(images):
        return images
    size = sharding.padded_size(batch_size, mesh)
    placed = dataclasses.replace(model, mesh=mesh)

    def there_and_back(params, pixels):
        latents = loss.posterior_mode(placed.encode_pixels(params, pixels))
        return to_pixels(placed.decode_in_parts(params, latents))

    run = sharding.over_batches(there_and_back, {"vae": vae}, size=size, mesh=mesh)
    starts = range(0, len(images), size)
    return np.concatenate([*run(images[i : i + size] for i in starts)])


def with_scaling_factor(
    model: StableDiffusion, moments: Float[np.ndarray, "N h w c2"]
) -> StableDiffusion:
    """Sets 1 / standard deviation of posterior samples (arXiv 2112.10752, G.1)."""
    mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
    deviation = np.sqrt(mean.var() + np.exp(log_variance).mean())
    factor = float(np.float32(1.0 / deviation))
    logging.info("scaling factor of the latents: %.4g", factor)
    vae = {**model.configs["vae"], "scaling_factor": factor}
    return dataclasses.replace(model, configs={**model.configs, "vae": vae})


def vae_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    model: StableDiffusion,
    tx: optax.GradientTransformation,
    key: Key[Array, ""],
    kl_weight: float,
    reconstruction: ReconstructionLoss,
) -> tuple[TrainState, dict[str, Array]]:
    """One step on the error of the reconstruction, with a small KL term.

    The loss of latent diffusion (arXiv 2112.10752, appendix G) without its adversarial
    term. `batch` has `images` uint8 [B, H, W, 3], `weight` [B] and, if the loss has
    feature maps, their variables as `features`.
    """
    keys = rng.step_keys(key, state.step, len(batch["weight"]))

    def loss_of(params):
        images = batch["images"] / 127.5 - 1.0
        moments = model.moments({"vae": params}, images)
        shape = (*moments.shape[1:3], model.latent_channels)
        latents = loss.posterior_sample(moments, rng.normal_like(keys, shape))
        decoded = model.decode({"vae": params}, latents)
        error = reconstruction(decoded, images, batch.get("features"))
        kl = loss.kl_divergence(moments)
        weight = batch["weight"]
        return weighted_mean(error + kl_weight * kl, weight), weighted_mean(kl, weight)

    (value, kl), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    metrics = {"loss": value, "kl": kl}
    return state.update(grads, tx, metrics), metrics


def unet_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    model: StableDiffusion,
    tx: optax.GradientTransformation,
    key: Key[Array, ""],
    drop_rate: float,
    ema_decay: float,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of latent diffusion on text (arXiv 2112.10752, equation 3).

    `batch` has `moments` [B, h, w, 2c], token `ids` [B, L], `null_ids` [1, L] of the
    empty prompt, which replaces a prompt at `drop_rate`, and `weight` [B]; of XL with
    ids for each encoder, and `time_ids` [B, 6].
    """
    keys = rng.step_keys(key, state.step, len(batch["weight"]))
    *keys, drop_keys = rng.use_keys(keys, 4)
    noisy, timesteps, target = add_noise(model, batch["moments"], keys)
    dropped = rng.uniform(drop_keys) < drop_rate
    dropped = jnp.expand_dims(dropped, range(1, batch["ids"].ndim))
    ids = jnp.where(dropped, batch["null_ids"], batch["ids"])

    def loss_of(params):
        conditions = model.conditions(params, ids, batch.get("time_ids"))
        prediction = model.denoise(params, noisy, timesteps, conditions)
        return weighted_mean(loss.squared_error(prediction, target), batch["weight"])

    value, grads = jax.value_and_grad(loss_of)(state.params)
    metrics = {"loss": value}
    return state.update(grads, tx, metrics, ema_decay=ema_decay), metrics


def add_noise(
    model: StableDiffusion,
    moments: Float[Array, "B h w c2"],
    keys: list[Key[Array, " B"]],
) -> tuple[Float[Array, "B h w c"], Int[Array, " B"], Float[Array, "B h w c"]]:
    """Noisy latents, their timesteps, and the target of the UNet's prediction.

    Args:
      model: the base.
      moments: of images; the latents are samples of the posterior.
      keys: for the noise, the samples and the timesteps.
    """
    noise_keys, posterior_keys, time_keys = keys
    shape = (*moments.shape[1:3], model.latent_channels)
    latents = loss.posterior_sample(moments, rng.normal_like(posterior_keys, shape))
    latents = latents * model.scaling_factor
    noise = rng.normal_like(noise_keys, shape)
    alphas = model.alphas_cumprod
    timesteps = rng.integers(time_keys, len(alphas))
    noisy = loss.add_noise(latents, noise, timesteps, alphas)
    target = loss.prediction_target(
        latents, noise, timesteps, alphas, model.prediction_type
    )
    return noisy, timesteps, target
