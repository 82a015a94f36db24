"""The programs of the stages, ready to be lowered from shapes alone.

Each is the very function that its stage compiles, with the shardings that the stage
uses and, where no option says otherwise, the sizes of `configs/common.py`. No array is
made: arguments are shapes with shardings.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from architectures import SCHEDULE, SECOND_TEXTS, TEXTS, UNETS, VAES

from mvc_jax import devices
from mvc_jax import finetune as finetune_stage
from mvc_jax.checkpoints import families, scheduler_config
from mvc_jax.classification import classifier
from mvc_jax.configs import common, presets
from mvc_jax.errors import UserError
from mvc_jax.generation import image_sampler
from mvc_jax.models import classifiers
from mvc_jax.models.stable_diffusion import TIME_IDS, StableDiffusion
from mvc_jax.pretraining import base
from mvc_jax.training import loop, optim, rng, sharding, throughput


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled.

    Attributes:
      family: of Stable Diffusion, a key of `architectures.UNETS`.
      batch: examples of a call on all devices; 0: the config's default.
      size: of the images in pixels along a side.
      remat: of the UNet's backward pass.
      accumulate: micro-batches of a step.
      ema: decay of the averaged parameters of `finetune` and `lora`; 0: none.
      attention: implementation in the UNet.
      dtype: of activations while training, as in the config.
      preset: of `generate`: "" or `fast`.
      classifier: its name.
      classifier_size: of its images in pixels along a side.
      policy: its augmentation.
      stem: of a ResNet; "" for its own.
      optimizer: of a classifier; "" for the config's.
      seeds: classifiers side by side.
      steps_at_once: steps of a classifier in one call.
    """

    family: str = "sd15"
    batch: int = 0
    size: int = 512
    remat: str = "none"
    accumulate: int = 1
    ema: float = 0.0
    attention: str = "auto"
    dtype: str = "auto"
    preset: str = ""
    classifier: str = "wrn28_10"
    classifier_size: int = 32
    policy: str = "randaugment"
    stem: str = ""
    optimizer: str = ""
    seeds: int = 1
    steps_at_once: int = 1


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the shapes of its arguments.

    Attributes:
      function: from `jax.jit`.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings.
      examples: of one call, on all devices.
    """

    function: Any
    arguments: tuple[Any, ...]
    examples: int

    def flops(self) -> float:
        """FLOPs of the matrix products and convolutions of a call, on all devices.

        Recomputed activations count. Build the program with `attention="xla"`: the
        products inside of kernels are not counted.
        """
        placed = jax.tree.leaves(self.arguments)[0].sharding
        platform = next(iter(placed.device_set)).platform
        return throughput.count_flops(self.function, *self.arguments, platform=platform)


def build(name: str, options: Options, mesh: jax.sharding.Mesh) -> Program:
    """The program of a name in `PROGRAMS`.

    Raises:
      UserError: the devices do not divide the batch.
    """
    program = PROGRAMS[name](options, mesh)
    parts = mesh.size * options.accumulate
    if program.examples % parts:
        raise UserError(
            "--batch",
            wanted=f"a multiple of {parts}: {mesh.size} devices x "
            f"{options.accumulate} micro-batches",
            got=f"{program.examples}",
            fix=f"Try --batch={-(-program.examples // parts) * parts}.",
        )
    return program


def architecture(options: Options, *, conditioned: bool = True) -> StableDiffusion:
    """Stable Diffusion of the family, without weights and tokenizer.

    Raises:
      UserError: its networks cannot halve the side of the images.
    """
    unet = UNETS[options.family] | {"in_channels": 8 if conditioned else 4}
    configs = {
        "unet": unet,
        "vae": VAES[options.family],
        "text_encoder": TEXTS[options.family],
        "scheduler": scheduler_config.ddim_config(SCHEDULE),
    }
    if options.family in SECOND_TEXTS:
        configs["text_encoder_2"] = SECOND_TEXTS[options.family]
    factor = families.size_factor(configs)
    if options.size % factor:
        raise UserError(
            "--size",
            wanted=f"a multiple of {factor} pixels",
            got=f"{options.size}",
            fix=f"Try --size={-(-options.size // factor) * factor}.",
        )
    return StableDiffusion(configs, tokenizer=None)


def _null(model: StableDiffusion) -> Any:
    """The shapes of the empty prompt's conditions, which are of no image."""
    shapes = model.condition_shapes(1)
    if model.pooled_width:
        del shapes["time_ids"]
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes
    )


def _shape(shape: tuple[int, ...], dtype: str, placed: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=placed)


def _placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings: a tree of them, or one for all leaves."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=placed
        ),
        shapes,
        shardings,
    )


def _finetune(options: Options, mesh: jax.sharding.Mesh, *, mode: str) -> Program:
    config = common.get_config()
    section = config.finetune
    section.mode, section.accumulate = mode, options.accumulate
    section.ema_decay = options.ema
    model = architecture(options).with_compute_options(
        dtype=options.dtype,
        mesh=mesh,
        attention=options.attention,
        remat=options.remat,
    )
    unet = model.shapes("unet")
    model = dataclasses.replace(
        model,
        batch_sharding=sharding.batch_sharding(mesh),
        weight_shardings=sharding.tree_shardings(unet, mesh),
    )
    trained, fixed = unet, {}
    if mode == "lora":
        split = functools.partial(
            finetune_stage.trained_and_frozen, config, dtype=model.dtype
        )
        trained, fixed = jax.eval_shape(split, unet)
    shardings = sharding.tree_shardings(trained, mesh)
    step, tx = finetune_stage.make_step(config, model, shardings)
    state = _state(trained, tx, mesh, ema=section.ema_decay > 0)
    size = options.batch or section.batch_size
    side = options.size // model.downsampling
    rows = sharding.batch_sharding(mesh)
    moments = _shape((size, side, side, 2 * model.latent_channels), "float32", rows)
    batch = {
        "source_moments": moments,
        "target_moments": moments,
        "text_states": _placed(model.condition_shapes(size), rows),
        "weight": _shape((size,), "float32", rows),
    }
    fixed["null_states"] = _null(model)
    constants = _placed(fixed, sharding.tree_shardings(fixed, mesh))
    return Program(loop.jit_step(step, state), (state, constants, batch), size)


def _state(
    params: Any, tx: Any, mesh: jax.sharding.Mesh, *, ema: bool
) -> loop.TrainState:
    """The shapes and shardings of `loop.create_state`."""
    create = functools.partial(loop.create_state, tx=tx, mesh=mesh, ema=ema)
    shapes = jax.eval_shape(create, params)
    return _placed(shapes, sharding.tree_shardings(shapes, mesh))


def _generate(options: Options, mesh: jax.sharding.Mesh) -> Program:
    config = common.get_config()
    if options.preset:
        presets.PRESETS[options.preset](config)
    section = config.generate
    size = options.batch or section.batch_size
    settings = image_sampler.Settings(
        sampler=section.sampler,
        steps=section.steps,
        guidance_interval=section.guidance_interval,
        batch_size=size,
        attention=options.attention,
    )
    model = architecture(options)
    params = {name: model.shapes(name) for name in ("unet", "vae")}
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    side = options.size // model.downsampling
    batch = {
        "moments": _shape(
            (size, side, side, 2 * model.latent_channels), "float32", rows
        ),
        "states": _placed(model.condition_shapes(size), rows),
        "noise_seed": _shape((size,), "int32", rows),
        "redraws": _shape((size,), "int32", rows),
        "text_scale": _shape((size,), "float32", rows),
        "image_scale": _shape((size,), "float32", rows),
    }
    arguments = (
        _placed(params, sharding.tree_shardings(params, mesh)),
        batch,
        _placed(_null(model), whole),
        _placed(jax.eval_shape(jax.random.key, 0), whole),
    )
    draw = image_sampler.jit_sample_images(model, None, settings, mesh)
    return Program(draw, arguments, size)


def _encode(options: Options, mesh: jax.sharding.Mesh) -> Program:
    size = options.batch or common.get_config().encode.batch_size
    model = architecture(options, conditioned=False)
    model = dataclasses.replace(model, mesh=mesh)
    params = _placed({"vae": model.shapes("vae")}, sharding.replicated(mesh))
    shape = (size, options.size, options.size, 3)
    images = _shape(shape, "uint8", sharding.batch_sharding(mesh))
    return Program(jax.jit(model.encode_pixels), (params, images), size)


def _classify(options: Options, mesh: jax.sharding.Mesh) -> Program:
    section = common.get_config().classify
    size = options.batch or section.batch_size
    side, classes, images = options.classifier_size, 10, 10_000
    network = classifiers.make(
        options.classifier,
        num_classes=classes,
        dtype=devices.activations_dtype(options.dtype, mesh),
        stem=options.stem,
    )
    spec = classifier.ClassifierSpec(network, policy=options.policy)
    tx = optim.optimizer(
        options.optimizer or section.optimizer,
        1.0,
        weight_decay=section.weight_decay,
        momentum=section.momentum,
    )
    create = functools.partial(
        classifier.create_state, spec, tx, mesh=mesh, image_shape=(side, side, 3)
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), options.seeds))
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    with jax.disable_jit():  # its compiler options are refused inside of a trace
        state = _placed(jax.eval_shape(create, keys), whole)
    constants = {
        "images": _shape((images, side, side, 3), "uint8", whole),
        "labels": _shape((images,), "int32", whole),
        "key": _shape((options.seeds, 2), "uint32", whole),
        "rates": _shape((section.steps,), "float32", whole),
    }
    stride = options.steps_at_once
    shape = (size, *([stride] if stride > 1 else []), options.seeds)
    batch = {
        "index": _shape(shape, "int32", rows),
        "weight": _shape(shape, "float32", rows),
    }
    step = functools.partial(classifier.train_seeds, spec=spec, tx=tx)
    function = loop.jit_step(step, state, stride)
    return Program(function, (state, constants, batch), size * stride)


def _pretrain(options: Options, mesh: jax.sharding.Mesh) -> Program:
    section = common.get_config().pretrain.unet
    model = architecture(options, conditioned=False)
    tx = optim.adam(optim.warmup_cosine(section.learning_rate, warmup=100, steps=1000))
    step = functools.partial(
        base.unet_step,
        model=dataclasses.replace(model, mesh=mesh),
        tx=tx,
        key=rng.purpose_key(0, "pretrain/unet"),
        drop_rate=section.drop_rate,
        ema_decay=section.ema_decay,
    )
    params = {name: model.shapes(name) for name in (*model.text_encoders, "unet")}
    state = _state(params, tx, mesh, ema=True)
    size = options.batch or section.batch_size
    side = options.size // model.downsampling
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    several = (len(model.text_encoders),) if model.pooled_width else ()
    ids = (*several, model.context_length)
    batch = {
        "moments": _shape(
            (size, side, side, 2 * model.latent_channels), "float32", rows
        ),
        "ids": _shape((size, *ids), "int32", rows),
        "weight": _shape((size,), "float32", rows),
    }
    if model.pooled_width:
        batch["time_ids"] = _shape((size, TIME_IDS), "int32", rows)
    constants = {"null_ids": _shape((1, *ids), "int32", whole)}
    return Program(loop.jit_step(step, state), (state, constants, batch), size)


PROGRAMS: dict[str, Callable[[Options, jax.sharding.Mesh], Program]] = {
    "finetune": functools.partial(_finetune, mode="full"),
    "lora": functools.partial(_finetune, mode="lora"),
    "generate": _generate,
    "encode": _encode,
    "classify": _classify,
    "pretrain": _pretrain,
}
