"""Cache, pairs -> a fine-tuned UNet that is conditioned on a source image.

Reads: the base model, `encode/`, `pairs/`. Writes: `model/`, the whole pipeline in the
diffusers layout (`StableDiffusionInstructPix2PixPipeline`, or that of XL) with its
model card; `samples/`, images of fixed pairs from fixed noise; with `mode = "lora"`
also `lora/`, the adapters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import files, processes
from mvc_jax.diffusion import timesteps
from mvc_jax.errors import UserError, require_at_most
from mvc_jax.stage import Spec, open_stage
from mvc_jax.work import Sizes, Work

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp
    import optax

    from mvc_jax import devices
    from mvc_jax.checkpoints import (
        diffusers_layout,
        lora_file,
        model_card,
        pipeline_folder,
    )
    from mvc_jax.data import cache as pair_cache
    from mvc_jax.data import order, splits
    from mvc_jax.diffusion import instruct_pix2pix, loss, samplers
    from mvc_jax.models import lora, stable_diffusion
    from mvc_jax.training import (
        checkpoint,
        gallery,
        loop,
        memory,
        optim,
        rng,
        sharding,
        throughput,
        train_logger,
    )

# These change what is kept, what is shown, or the speed, but not the result.
_NO_RESULT = (
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep",
    "sample_every",
    "samples",
    "memory_gib",
    "attention",
    "remat",
    "accumulate",
)
_FEWER = "steps that were taken stay: more of them go on"
_NOT_LONGER = (
    "the cosine falls to 0 at the last step, so that other steps start over; with "
    "finetune.schedule=constant, a model that was finished would go on"
)
# Activations of Stable Diffusion 1.5's step by mode and `remat`, relative to those of
# full fine-tuning without it, as compiled for an H100 or for TPUs, whichever is larger
# (docs/scaling.md). Adapters with `full` were not compiled: at most as with `blocks`.
_ACTIVATIONS = {
    "full": {"none": 1.0, "blocks": 0.18, "full": 0.16},
    "lora": {"none": 0.80, "blocks": 0.22, "full": 0.22},
}
# Weights and two moments in float32, of which adapters leave the weights in bfloat16.
_FROZEN = 6
_MEMORY_HINT = (
    "Lower config.finetune.batch_size ({batch_size}) or raise "
    "config.finetune.accumulate ({accumulate}); set config.finetune.remat ({remat}) to "
    "blocks or full; split the state over devices by config.mesh.fsdp; or train "
    "adapters only by config.finetune.mode=lora ({mode})."
)


def check(config: ConfigDict) -> None:
    """Checks the warm-up of `finetune`, its samples, and the targets of adapters."""
    section, base, draws = config.finetune.to_dict(), config.base, config.generate
    require_at_most("config.finetune", section, "warmup", "steps")
    if section["sample_every"]:
        timesteps.require_noise(draws.sampler, draws.steps, draws.timestep_spacing)
    if section["mode"] == "lora" and base.path:
        if pipeline_folder.is_hub_name(base.path):
            return  # its layers are known after the download
        model, _ = diffusers_layout.load(base.path, (), base.variant)
        targets = section["lora"]["targets"]
        lora.check_targets(model.shapes("unet"), targets, lora_file.layer_name)


def price(config: ConfigDict, sizes: Sizes) -> Work:
    """What there is to train; adapters are too small to count."""
    section, side, base = config.finetune, config.data.size, sizes.base
    full, unet = section.mode == "full", base.parameters["unet"]
    copies = 4 if section.ema_decay else 3  # weights, two moments, an average
    state = 4 * copies * unet if full else 0
    example = 4 * (2 * math.prod(base.moments_shape(side)) + base.text_numbers())
    model = 4 * sum(base.parameters.values())
    speed = ("mode", "lora", "batch_size", "accumulate", "dtype", "attention", "remat")
    alive = -(-section.batch_size // section.accumulate)
    return Work(
        {"steps": section.steps, "pairs": section.steps * section.batch_size},
        unit="steps",
        speed={
            **{name: section.to_dict()[name] for name in speed},
            "ema": section.ema_decay > 0,
            "base": base.speed,
            "size": side,
            "mesh": config.mesh.to_dict(),
        },
        on_devices=True,
        # The oldest checkpoint is deleted after the newest is written.
        disk={"checkpoints": (section.keep + 1) * state, "model": model},
        asks=state,
        leaves=model,
        host={"a batch of pairs": section.batch_size * example},
        devices={
            "weights, moments and gradients": state + 4 * unet if full else 2 * unet,
            "a batch of pairs": section.batch_size * example,
            "their activations": alive * base.unet_bytes(side, remat=section.remat),
        },
        lower=("finetune.batch_size",),
    )


def stage_spec(config: ConfigDict) -> Spec:
    """What the fine-tuned model depends on; at a constant rate it may train on."""
    settings = {
        "seed": config.seed,
        "base": config.base.to_dict(),
        "finetune": result_settings(config.finetune),
    }
    goes_on = config.finetune.schedule == "constant"
    return Spec(
        "finetune",
        settings,
        inputs=("encode", "pairs"),
        grows=("finetune.steps",) if goes_on else (),
        remarks={"finetune.steps": _FEWER if goes_on else _NOT_LONGER},
    )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Widens the base UNet, trains it on the pairs, writes the pipeline."""
    workdir = epath.Path(workdir)
    stage = open_stage(workdir, stage_spec(config))
    if stage.complete:
        return
    try:
        written, skipped = train(config, workdir, stage.folder)
    except UserError:
        if not files.matching(stage.folder, "checkpoints/[0-9]*"):
            stage.abandon()  # nothing is kept: the settings may be changed
        raise
    stage.finish(written, steps=config.finetune.steps, skipped_steps=skipped)


def result_settings(section: ConfigDict) -> dict[str, Any]:
    """The fields of the section that determine the result."""
    return {k: v for k, v in section.to_dict().items() if k not in _NO_RESULT}


def train(
    config: ConfigDict, workdir: epath.Path, folder: epath.Path
) -> tuple[list[str], int]:
    """Trains the UNet, or adapters, from the last checkpoint on, and exports it.

    Returns:
      the files written, relative to `folder`, and the number of skipped steps.
    """
    section = config.finetune
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    model, params = load_base(workdir)
    model = model.with_compute_options(
        dtype=section.dtype,
        mesh=mesh,
        attention=section.attention,
        remat=section.remat,
    )
    cache = pair_cache.open_cache(workdir / "encode")
    processes.on_first("the cache", cache.verify)
    trained, fixed = trained_and_frozen(config, params.pop("unet"), model.dtype)
    fixed["null_states"] = cache.null_states
    fixed = sharding.place(fixed, sharding.tree_shardings(fixed, mesh))
    draw_hook = None
    if section.sample_every:
        shown = make_gallery(config, workdir, model, mesh, cache, params, fixed)
        draw_hook = train_logger.DrawHook(section.sample_every, shown.draw)
    model = dataclasses.replace(
        model,
        batch_sharding=sharding.batch_sharding(mesh),
        weight_shardings=sharding.tree_shardings(fixed.get("base", trained), mesh),
    )
    step, tx = make_step(config, model, sharding.tree_shardings(trained, mesh))
    state = loop.create_state(trained, tx, mesh, ema=section.ema_decay > 0)
    del trained  # gigabytes on the host
    state = loop.fit(
        step,
        state,
        read=functools.partial(
            pair_cache.read_pairs,
            cache,
            files.read_array(workdir / "pairs" / "pairs.npy"),
            seed=config.seed,
            batch_size=section.batch_size,
        ),
        constants=fixed,
        mesh=mesh,
        steps=section.steps,
        checkpoints=checkpoint.Checkpoints(
            folder / "checkpoints",
            every=section.checkpoint_every,
            minutes=section.checkpoint_minutes,
            keep=section.keep,
        ),
        logger=train_logger.TrainLogger(
            workdir,
            "finetune",
            log_every=section.log_every,
            max_skipped=section.max_skipped,
            flops=step_flops(model, section.mode, *cache.moments.shape[1:3]),
            draw_hook=draw_hook,
        ),
        accumulate=section.accumulate,
        memory_budget=memory.MemoryBudget(
            int(section.memory_gib * 2**30),
            _MEMORY_HINT.format(**section),
            functools.partial(
                what_fits,
                mode=section.mode,
                remat=section.remat,
                batch_size=section.batch_size,
                accumulate=section.accumulate,
            ),
        ),
    )
    unused = {"opt_state": None}
    if state.ema_params is not None:
        unused["params"] = None
    state = sharding.readable(state.replace(**unused))
    written = processes.on_first(
        "the pipeline", lambda: export(config, workdir, model, params, state)
    )
    return written, int(state.skipped)


def what_fits(
    held: int,
    new: int,
    size: int,
    *,
    mode: str,
    remat: str,
    batch_size: int,
    accumulate: int,
) -> str:
    """Estimates what would make a step fit that takes `held` + `new` > `size` bytes.

    By the compiled programs of Stable Diffusion 1.5 (docs/scaling.md): the gradients of
    a full fine-tuning take a third of what the state takes, and the rest of `new` are
    activations, in proportion to the examples that are alive at once.

    Args:
      held: bytes of state and batch on a device.
      new: further bytes of the step.
      size: bytes that there are.
      mode: `full` or `lora`.
      remat: what is recomputed now.
      batch_size: examples of a step.
      accumulate: its micro-batches.
    """
    gradients = held // 3 if mode == "full" else 0
    activations = max(new - gradients, 1)
    room = size - held - gradients
    now = _ACTIVATIONS[mode][remat]
    found = []
    for choice, fraction in _ACTIVATIONS[mode].items():
        if fraction < now and activations * fraction / now <= room:
            gib = (held + gradients + activations * fraction / now) / 2**30
            found.append(f"remat={choice} ({gib:.1f} GiB)")
    micro = int(batch_size / accumulate * room / activations)
    if micro > 0:
        found.append(f"accumulate={math.ceil(batch_size / micro)}")
        found.append(f"batch_size={micro * accumulate}")
    if mode == "full":
        found += _adapters_that_fit(held // _FROZEN, activations / now, size, remat)
    words = "Its state and gradients alone do not fit. " if room <= 0 else ""
    if not found:
        return words.strip() or "None of these alone will do."
    return (
        f"{words}By the memory of Stable Diffusion 1.5 would fit: {', '.join(found)}."
    )


def _adapters_that_fit(
    held: int, activations: float, size: int, remat: str
) -> list[str]:
    """`mode=lora` with the least `remat` with which it fits, if it does with any.

    Args:
      held: bytes of the frozen base.
      activations: bytes of those of full fine-tuning without `remat`.
      size: bytes that there are.
      remat: of the step that does not fit; no less is proposed.
    """
    choices = list(_ACTIVATIONS["lora"])
    for choice in choices[choices.index(remat) :]:
        needed = held + activations * _ACTIVATIONS["lora"][choice]
        if needed <= size:
            more = "" if choice == remat else f" with remat={choice}"
            return [f"mode=lora{more} ({needed / 2**30:.1f} GiB)"]
    return []


def load_base(
    workdir: epath.Path,
    components: Sequence[str] | None = None,
) -> tuple[stable_diffusion.StableDiffusion, dict]:
    """Reads the base that `encode` used, conditioned on source latents.

    Returns:
      the architecture, and host parameters of the components; None: of all.
    """
    base, params = diffusers_layout.load(
        **diffusers_layout.recorded_base(workdir), components=components
    )
    model, params = base.widened(params)
    if model is base:
        logging.info("the base's UNet already takes source latents: not widened")
    return model, params


def trained_and_frozen(config: ConfigDict, unet: dict, dtype: str) -> tuple[dict, dict]:
    """Splits the UNet into the parameters to train and those that stay fixed.

    Returns:
      the UNet's parameters and nothing; or new adapters, and the UNet's parameters as
      `base`.
    """
    if config.finetune.mode == "full":
        return unet, {}
    generator = order.generator(config.seed, "finetune/lora")
    adapters = lora.init(
        unet, name_of=lora_file.layer_name, rng=generator, **config.finetune.lora
    )
    return adapters, {"base": lora.frozen(unet, dtype)}


def make_step(
    config: ConfigDict, model: stable_diffusion.StableDiffusion, shardings: Any
) -> tuple[functools.partial, optax.GradientTransformation]:
    """Makes `train_step` as a function of state and batch, and its optimiser."""
    section = config.finetune
    schedule = optim.schedule(
        section.schedule,
        section.learning_rate,
        warmup=section.warmup,
        steps=section.steps,
    )
    tx = optim.adam(schedule, max_norm=section.max_norm)
    step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        schedule=schedule,
        key=rng.purpose_key(config.seed, "finetune"),
        drop_rate=section.drop_rate,
        ema_decay=section.ema_decay,
        min_snr=section.min_snr,
        accumulate=section.accumulate,
        shardings=shardings,
    )
    return step, tx


def train_step(
    state: loop.TrainState,
    batch: dict,
    *,
    model: stable_diffusion.StableDiffusion,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    key: jax.Array,
    drop_rate: float,
    ema_decay: float = 0.0,
    min_snr: float = 0.0,
    accumulate: int = 1,
    shardings: Any = None,
) -> tuple[loop.TrainState, dict]:
    """One InstructPix2Pix step (arXiv 2211.09800, equation 2).

    Args:
      state: with the UNet's parameters; or with adapters, if the batch has a `base`.
      batch: as of `instruct_pix2pix.examples`, with a `weight` of 0 for padding; for
        adapters the frozen parameters of the UNet, `base`.
      model: the architecture, conditioned.
      tx: the optimiser.
      schedule: its learning rate by steps taken, for the log.
      key: root of the step's randomness, which is a function of the step and of the
        example's place in the batch.
      drop_rate: p of `loss.drop_conditions`.
      ema_decay: of the averaged parameters, if the state keeps them.
      min_snr: gamma of `loss.loss_weights`; 0 gives all timesteps the same weight.
      accumulate: number of micro-batches, a divisor of B.
      shardings: of the parameters, if these are sharded.

    Returns:
      the next state; `loss`, `grad_norm` (before clipping), `learning_rate`.
    """
    step_key = jax.random.fold_in(key, state.step)
    examples = noised(batch, step_key, model=model, drop_rate=drop_rate)
    alphas = model.alphas_cumprod

    def losses(trained, part):
        prediction = model.denoise(
            unet_params(trained, batch),
            part["inputs"],
            part["timesteps"],
            part["text_states"],
        )
        error = loss.squared_error(prediction, part["target"])
        if min_snr > 0:
            error *= loss.loss_weights(
                part["timesteps"], alphas, model.prediction_type, min_snr
            )
        return error

    value, grads = loop.gradients(losses, state.params, examples, accumulate, shardings)
    metrics = {
        "loss": value,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(schedule(state.step - state.skipped)),
    }
    new = state.update(grads, tx, metrics, ema_decay=ema_decay, shardings=shardings)
    return new, metrics


def noised(
    batch: dict,
    key: jax.Array,
    *,
    model: stable_diffusion.StableDiffusion,
    drop_rate: float,
) -> dict[str, jax.Array]:
    """Makes a batch's examples (`instruct_pix2pix.examples`) by the key of its step."""
    keys = rng.example_keys(key, jnp.arange(batch["weight"].shape[0]))
    posterior_keys, noise_keys, time_keys, drop_keys = rng.use_keys(keys, 4)
    shape = (*batch["target_moments"].shape[1:3], model.latent_channels)
    draws = {
        "posterior": rng.normal_like(posterior_keys, shape),
        "noise": rng.normal_like(noise_keys, shape),
        "timesteps": rng.integers(time_keys, len(model.alphas_cumprod)),
        "dropout": rng.uniform(drop_keys),
    }
    return instruct_pix2pix.examples(
        batch,
        draws,
        alphas_cumprod=model.alphas_cumprod,
        prediction_type=model.prediction_type,
        scaling_factor=model.scaling_factor,
        drop_rate=drop_rate,
    )


def unet_params(trained: dict, fixed: dict) -> dict:
    """The parameters of `denoise`: the trained UNet, or the fixed one and adapters."""
    if "base" in fixed:
        return {"unet": fixed["base"], "lora": trained}
    return {"unet": trained}


def step_flops(
    model: stable_diffusion.StableDiffusion, mode: str, height: int, width: int
) -> float:
    """FLOPs of a training step on one example, without those of rematerialisation.

    A backward pass takes two forward passes, or one if the weights are frozen.

    Args:
      model: the architecture; its attention is counted in its plain form.
      mode: `full` or `lora`.
      height: of the latents.
      width: of the latents.
    """
    model = dataclasses.replace(
        model, attention="xla", remat="none", batch_sharding=None
    )

    def forward(unet, *inputs):
        return model.denoise({"unet": unet}, *inputs)

    passes = {"full": 3, "lora": 2}[mode]
    flops = throughput.count_flops(
        forward,
        model.shapes("unet"),
        *model.inputs(height, width),
        platform=devices.platform(model.mesh),
    )
    return passes * flops


def make_gallery(
    config: ConfigDict,
    workdir: epath.Path,
    model: stable_diffusion.StableDiffusion,
    mesh: jax.sharding.Mesh,
    cache: pair_cache.Cache,
    params: dict,
    fixed: dict,
) -> gallery.Gallery:
    """Shows pairs of all classes, sampled and guided as `generate` will do it."""
    options = config.generate
    train = splits.read_split(workdir / "caption", "train")
    pairs = files.read_array(workdir / "pairs" / "pairs.npy")
    pairs = pair_cache.pairs_of_all_classes(
        pairs, train.labels, config.finetune.samples
    )
    source, target = pairs.T
    sampler = samplers.make(
        options.sampler,
        options.steps,
        alphas_cumprod=model.alphas_cumprod,
        prediction_type=model.prediction_type,
        spacing=options.timestep_spacing,
    )
    key = rng.purpose_key(config.seed, "finetune/samples")
    shape = (*cache.moments.shape[1:3], model.latent_channels)

    @jax.jit
    def sample(trained, fixed, batch):
        latents = instruct_pix2pix.draw(
            functools.partial(model.denoise, unet_params(trained, fixed)),
            rng.normal_like(rng.example_keys(key, batch["index"]), shape),
            batch["moments"],
            batch["text_states"],
            fixed["null_states"],
            sampler=sampler,
            text_scale=options.text_scale,
            image_scale=options.image_scale,
            guidance_interval=options.guidance_interval,
            guidance_rescale=options.guidance_rescale,
        )
        images = model.decode_in_parts(fixed, latents)
        return stable_diffusion.to_pixels(images, grey=train.grey)

    fixed = fixed | {"vae": params["vae"]}
    fixed = sharding.place(fixed, sharding.tree_shardings(fixed, mesh))
    return gallery.Gallery(
        workdir / "finetune" / "samples",
        lambda trained, batch: sample(trained, fixed, batch),
        {
            "moments": cache.moments_of(source),
            "text_states": cache.conditions_of(target),
            "index": np.arange(len(pairs), dtype=np.int32),
        },
        names=[train.class_names[label] for label in train.labels[source]],
        beside={"source": train.images[source], "a real one": train.images[target]},
        mesh=mesh,
    )


def export(
    config: ConfigDict,
    workdir: epath.Path,
    model: stable_diffusion.StableDiffusion,
    params: dict,
    state: Any,
) -> list[str]:
    """Writes the pipeline with its card, and in `lora` mode the adapters too.

    Returns:
      the files written, relative to the folder of this stage.
    """
    folder, trained, written = workdir / "finetune", state.averaged, []
    if config.finetune.mode == "lora":
        written += [
            f"lora/{name}" for name in lora_file.write(folder / "lora", trained)
        ]
        # From its file: the copy on the device may have been rounded to bfloat16.
        _, base = load_base(workdir, ("unet",))
        trained = lora.merge(base["unet"], trained)
    facts = model_facts(config, workdir, int(state.step - state.skipped))
    names = diffusers_layout.save(
        folder / "model",
        model,
        params | {"unet": trained},
        made_by={"stage": "finetune", "base": facts.base, "data": facts.dataset},
    )
    names += model_card.write(folder / "model", facts)
    return [*written, *(f"model/{name}" for name in names)]


def model_facts(
    config: ConfigDict, workdir: epath.Path, steps: int
) -> model_card.Facts:
    """Collects the contents of the model card.

    Args:
      config: of the run.
      workdir: of the run.
      steps: optimiser steps taken.
    """
    folder, commit = pipeline_folder.resolve(**diffusers_layout.recorded_base(workdir))
    base = "../../pretrain/model"
    if config.base.path:
        base = config.base.path if commit else str(folder.absolute())
    dataset = files.read_json(workdir / "caption" / "dataset.json")
    prompts = files.read_jsonl(workdir / "encode" / "prompts.jsonl")
    hyperparameters = result_settings(config.finetune)
    adapters = hyperparameters.pop("lora")
    if config.finetune.mode == "lora":
        for name, value in adapters.items():
            hyperparameters[f"lora.{name}"] = value
    return model_card.Facts(
        base=base,
        variant=config.base.variant,
        revision=commit,
        license=model_card.base_license(folder),
        dataset=dataset["name"],
        classes=dataset["class_names"],
        images=len(prompts),
        resolution=config.data.size,
        prompt=prompts[0]["prompt"],
        hyperparameters=hyperparameters,
        steps=steps,
        adapters="../lora" if config.finetune.mode == "lora" else None,
        family=pipeline_folder.read_family(folder),
    )
