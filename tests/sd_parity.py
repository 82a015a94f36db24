"""Comparisons with PyTorch: for each one our arrays, and PyTorch's.

`COMPARISONS` maps a name to a pair of functions that return arrays of the same names.
Ours takes a family; PyTorch's takes the family and its pipelines, which it reads from
the folders that our `save` wrote. `golden/make.py` stores what PyTorch's return.
"""

import copy
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sd_families
from sd_families import LATENTS, PROMPTS, normal

from mvc_jax.checkpoints import diffusers_layout
from mvc_jax.diffusion import instruct_pix2pix, loss, samplers
from mvc_jax.diffusion.timesteps import leading
from mvc_jax.models.stable_diffusion import Params, StableDiffusion

Arrays = dict[str, np.ndarray]
GOLDEN = pathlib.Path(__file__).with_name("golden")

TIMESTEPS = np.array([0, 1, 500, 999], np.int32)
DROP_RATE = 0.05
UNIFORM = np.array([0.02, 0.07, 0.12, 0.5], np.float32)  # no text, none, no image, both
TIME_IDS = np.array(  # an image as it is, a small one, two that were cropped
    [
        [64, 128, 0, 0, 64, 128],
        [32, 28, 0, 0, 64, 128],
        [900, 1600, 0, 171, 64, 128],
        [720, 480, 12, 0, 64, 128],
    ],
    np.float32,
)
SIZED = slice(2, 3)  # whose row of `TIME_IDS` the whole sample has
TEXT_SCALE, IMAGE_SCALE, STEPS = 7.5, 1.5, 4


def bar(name: str, reference: np.ndarray) -> float:
    """The largest difference allowed: 1e-5, or 1e-4 after all steps of sampling.

    Absolute for arrays of order 1, relative to the largest number in smaller ones.
    """
    scale = min(1.0, float(np.abs(reference).max()))
    return (1e-4 if name == "sample" else 1e-5) * scale


def assert_equal(name: str, ours: Arrays, reference: Arrays) -> None:
    """Fails with the array, the difference and the scale of what is compared."""
    assert ours.keys() == reference.keys()
    for key, expected in reference.items():
        actual = ours[key]
        assert actual.shape == expected.shape, (key, actual.shape, expected.shape)
        if expected.dtype.kind == "i":
            np.testing.assert_array_equal(actual, expected)
            continue
        scale = f"{key}: std {expected.std():.2g}, largest {np.abs(expected).max():.2g}"
        print(scale, f"difference {np.abs(actual - expected).max():.1e}")
        np.testing.assert_allclose(
            actual, expected, rtol=0, atol=bar(name, expected), err_msg=scale
        )


def read_golden(family: str, name: str) -> Arrays:
    with np.load(GOLDEN / f"{family}.npz") as stored:
        keys = [key for key in stored if key.startswith(f"{name}/")]
        return {key.removeprefix(f"{name}/"): stored[key] for key in keys}


def thin(arrays: Arrays) -> Arrays:
    """Every seventh number of large arrays, in order, as golden files hold them."""
    return {
        key: array.reshape(-1)[::7] if array.size > 4096 else array
        for key, array in arrays.items()
    }


def jit_fast(function: Callable) -> Callable:
    """Compiles in half the time, to a slower program: it runs once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def write_folders(family: str, root: pathlib.Path) -> None:
    """Writes the base and its fine-tuned model by our `save`."""
    diffusers_layout.save(root / "base", *sd_families.checkpoint(family))
    diffusers_layout.save(root / "fine_tuned", *sd_families.fine_tuned(family))


class Pipelines:
    """PyTorch's pipelines from the two folders of `write_folders`."""

    def __init__(self, root: pathlib.Path):
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
        read = diffusers.DiffusionPipeline.from_pretrained
        self.base, self.fine_tuned = read(root / "base"), read(root / "fine_tuned")
        for pipeline in (self.base, self.fine_tuned):
            made = type(pipeline.scheduler).from_config
            config = pipeline.scheduler.config
            pipeline.scheduler = made(config, timestep_spacing="leading")
        self.fine_tuned.set_progress_bar_config(disable=True)


def unet_inputs(model: StableDiffusion, family: str) -> tuple:
    config = model.configs["unet"]
    batch = len(TIMESTEPS)
    latents = normal(f"{family} latents", batch, *LATENTS, config["in_channels"])
    conditions = normal(f"{family} states", batch, 77, config["cross_attention_dim"])
    if model.pooled_width:
        pooled = normal(f"{family} pooled", batch, model.pooled_width)
        conditions = {"states": conditions, "pooled": pooled, "time_ids": TIME_IDS}
    return latents, TIMESTEPS, conditions


def unet(family: str) -> Arrays:
    model, params = sd_families.checkpoint(family)
    inputs = unet_inputs(model, family)
    return {
        "prediction": np.asarray(jax.jit(model.denoise)(_only(params, "unet"), *inputs))
    }


def unet_torch(family: str, pipelines: Pipelines) -> Arrays:
    model, _ = sd_families.checkpoint(family)
    latents, timesteps, conditions = unet_inputs(model, family)
    conditions = jax.tree.map(_tensor, conditions)
    network = pipelines.base.unet
    out = network(_tensor(latents), _tensor(timesteps), **_named(conditions)).sample
    return {"prediction": _array(out)}


def autoencoder_inputs(family: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, and latents as the sampler would leave them."""
    latents = np.float32(0.18215) * normal(f"{family} decode", 1, *LATENTS, 4)
    return sd_families.images(f"{family} encode", 2), latents


def autoencoder(family: str) -> Arrays:
    model, params = sd_families.checkpoint(family)
    params = _only(params, "vae")
    images, latents = autoencoder_inputs(family)
    return {
        "moments": np.asarray(jax.jit(model.moments)(params, images)),
        "images": np.asarray(jax.jit(model.decode)(params, latents)),
    }


def autoencoder_torch(family: str, pipelines: Pipelines) -> Arrays:
    vae = pipelines.base.vae
    images, latents = autoencoder_inputs(family)
    posterior = vae.encode(_tensor(images)).latent_dist
    moments = np.concatenate([_array(posterior.mean), _array(posterior.logvar)], -1)
    decoded = vae.decode(_tensor(latents) / vae.config.scaling_factor).sample
    return {"moments": moments, "images": _array(decoded)}


def text(family: str) -> Arrays:
    model, params = sd_families.checkpoint(family)
    params = {name: params[name] for name in model.text_encoders}
    ids = model.tokenize(PROMPTS)
    found = jax.jit(model.conditions)(params, jnp.asarray(ids))
    arrays = {"ids": ids}
    if model.pooled_width:
        return arrays | {k: np.asarray(v) for k, v in found.items()}
    return arrays | {"states": np.asarray(found)}


def text_torch(family: str, pipelines: Pipelines) -> Arrays:
    pipeline = pipelines.base
    ids = [_tokenize_torch(pipeline.tokenizer, PROMPTS)]
    found = _conditions_torch(pipeline, PROMPTS)
    if not isinstance(found, dict):
        return {"ids": ids[0].numpy().astype(np.int32), "states": found.numpy()}
    ids.append(_tokenize_torch(pipeline.tokenizer_2, PROMPTS))
    ids = np.stack([each.numpy() for each in ids], axis=1).astype(np.int32)
    return {"ids": ids, **{name: found[name].numpy() for name in found}}


def schedule_inputs(family: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    latents, noise = normal(f"{family} schedule", 2, len(TIMESTEPS), 2, 3, 4)
    predictions = normal(f"{family} predictions", 7, len(TIMESTEPS), 2, 3, 4)
    return latents, noise, list(predictions)


def schedule(family: str) -> Arrays:
    model, _ = sd_families.checkpoint(family)
    latents, noise, predictions = schedule_inputs(family)
    alphas = model.alphas_cumprod
    arguments = (jnp.asarray(latents), jnp.asarray(noise), jnp.asarray(TIMESTEPS))
    velocity = loss.prediction_target(*arguments, alphas, "v_prediction")
    arrays = {
        "alphas_cumprod": alphas,
        "noisy": np.asarray(loss.add_noise(*arguments, alphas)),
        "velocity": np.asarray(velocity),
        "timesteps_50": leading(len(alphas), 50),
        "timesteps_7": leading(len(alphas), 7),
    }
    return arrays | {"steps": single_steps(model, latents, predictions)}


def single_steps(
    model: StableDiffusion, latents: np.ndarray, predictions: list[np.ndarray]
) -> np.ndarray:
    """DDIM's step from the same latents at each timestep.

    A step for a prediction of 0 only scales the latents, so the steps before the one in
    question are undone in advance.
    """
    sampler = make_sampler(model, len(predictions))
    latents = jnp.asarray(latents)

    def states(start, given):
        """The latents before every step, and after the last."""
        seen = []

        def predict(latents, timesteps):
            seen.append(latents)
            return given.get(len(seen) - 1, jnp.zeros_like(latents))

        with jax.disable_jit():  # a scan is then a loop in Python
            end = sampler(predict, start)
        return [*seen, end]

    made = []
    for i, (scaled, prediction) in enumerate(
        zip(states(latents, {})[:-1], predictions, strict=True)
    ):
        scale = (scaled / latents).mean()
        after = states(latents / scale, {i: jnp.asarray(prediction)})[i + 1]
        made.append(np.asarray(after))
    return np.stack(made)


def make_sampler(model: StableDiffusion, steps: int) -> samplers.Sampler:
    """As the golden files were drawn; so few steps would be refused."""
    return functools.partial(
        samplers.ddim,
        alphas_cumprod=model.alphas_cumprod,
        prediction_type=model.prediction_type,
        steps=steps,
        spacing="leading",
    )


def schedule_torch(family: str, pipelines: Pipelines) -> Arrays:
    """Noise by the published config, as diffusers' examples train; steps by ours."""
    import diffusers

    published = sd_families.SCHEDULERS[family]
    ddpm = diffusers.DDPMScheduler.from_config(published)
    latents, noise, predictions = schedule_inputs(family)
    exported = pipelines.base.scheduler
    arguments = (_tensor(latents), _tensor(noise), _tensor(TIMESTEPS).long())
    arrays = {
        "alphas_cumprod": ddpm.alphas_cumprod.numpy(),
        "noisy": _array(ddpm.add_noise(*arguments)),
        "velocity": _array(ddpm.get_velocity(*arguments)),
    }
    for count in (50, 7):
        exported.set_timesteps(count)
        timesteps = exported.timesteps.numpy().astype(np.int32)
        arrays[f"timesteps_{count}"] = timesteps
    steps = [
        exported.step(_tensor(prediction), timestep, _tensor(latents)).prev_sample
        for timestep, prediction in zip(exported.timesteps, predictions, strict=True)
    ]
    return arrays | {"steps": np.stack([_array(latents) for latents in steps])}


def training_inputs(family: str) -> dict[str, np.ndarray]:
    batch = len(TIMESTEPS)
    return {
        "target": sd_families.images(f"{family} target", batch),
        "source": sd_families.images(f"{family} source", batch),
        "posterior": normal(f"{family} posterior", batch, *LATENTS, 4),
        "noise": normal(f"{family} noise", batch, *LATENTS, 4),
    }


def training(family: str) -> Arrays:
    model, params = sd_families.fine_tuned(family)
    encode = jax.jit(model.moments)
    ids = jnp.asarray(model.tokenize(PROMPTS))
    texts = jax.jit(model.conditions)(params, ids)
    null = jax.tree.map(lambda array: array[PROMPTS.index("")], texts)
    if model.pooled_width:
        texts["time_ids"] = jnp.asarray(TIME_IDS)
    inputs = training_inputs(family)
    batch = {
        "target_moments": encode(_only(params, "vae"), inputs["target"]),
        "source_moments": encode(_only(params, "vae"), inputs["source"]),
        "text_states": texts,
        "null_states": null,
        "weight": jnp.ones(len(PROMPTS)),
    }
    draws = {
        "posterior": jnp.asarray(inputs["posterior"]),
        "noise": jnp.asarray(inputs["noise"]),
        "timesteps": jnp.asarray(TIMESTEPS),
        "dropout": jnp.asarray(UNIFORM),
    }

    def mean_loss(conv_in, unet, batch, draws):
        examples = instruct_pix2pix.examples(
            batch,
            draws,
            alphas_cumprod=model.alphas_cumprod,
            prediction_type=model.prediction_type,
            scaling_factor=model.scaling_factor,
            drop_rate=DROP_RATE,
        )
        prediction = model.denoise(
            {"unet": {**unet, "conv_in": conv_in}},
            examples["inputs"],
            examples["timesteps"],
            examples["text_states"],
        )
        return loss.squared_error(prediction, examples["target"]).mean()

    value, gradient = jit_fast(jax.value_and_grad(mean_loss))(
        params["unet"]["conv_in"], params["unet"], batch, draws
    )
    return {
        "loss": np.asarray(value),
        **{k: np.asarray(v) for k, v in gradient.items()},
    }


def training_torch(family: str, pipelines: Pipelines) -> Arrays:
    """The step of diffusers' InstructPix2Pix training example, with our draws."""
    import diffusers
    import torch

    pipeline = pipelines.fine_tuned
    vae = pipeline.vae
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    inputs = {name: _tensor(array) for name, array in training_inputs(family).items()}
    timesteps, uniform = _tensor(TIMESTEPS).long(), torch.from_numpy(UNIFORM)

    posterior = vae.encode(inputs["target"]).latent_dist
    latents = posterior.mean + posterior.std * inputs["posterior"]
    latents = latents * vae.config.scaling_factor
    noisy = scheduler.add_noise(latents, inputs["noise"], timesteps)
    source = vae.encode(inputs["source"]).latent_dist.mode()

    texts = _conditions_torch(pipeline, PROMPTS, TIME_IDS)
    null = _conditions_torch(pipeline, [""] * len(PROMPTS), TIME_IDS)
    no_text = uniform < 2 * DROP_RATE

    def dropped(null, given):
        return torch.where(no_text.reshape(-1, *[1] * (given.ndim - 1)), null, given)

    texts = jax.tree.map(dropped, null, texts)
    no_image = (uniform >= DROP_RATE) & (uniform < 3 * DROP_RATE)
    source = source * (1 - no_image.float()).reshape(-1, 1, 1, 1)

    target = inputs["noise"]
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, inputs["noise"], timesteps)
    # In double precision: the gradient of the bias is a sum that cancels, and PyTorch's
    # float32 kernels round it by as much as is allowed, on some processors by more.
    unet = copy.deepcopy(pipeline.unet).double()
    inputs = torch.cat([noisy, source], dim=1).double()
    with torch.enable_grad():
        texts = jax.tree.map(lambda tensor: tensor.double(), texts)
        prediction = unet(inputs, timesteps, **_named(texts)).sample
        value = torch.nn.functional.mse_loss(prediction, target.double())
        weight, bias = torch.autograd.grad(value, list(unet.conv_in.parameters()))
    return {
        "loss": value.detach().float().numpy(),
        "kernel": weight.permute(2, 3, 1, 0).float().numpy(),
        "bias": bias.float().numpy(),
    }


def sample_inputs(family: str) -> tuple[np.ndarray, str, np.ndarray]:
    source = sd_families.images(f"{family} condition", 1)
    return source, PROMPTS[1], normal(f"{family} start", 1, *LATENTS, 4)


def whole_sample(family: str) -> Arrays:
    model, params = sd_families.fine_tuned(family)
    source, prompt, noise = sample_inputs(family)
    ids = jnp.asarray(model.tokenize(["", prompt]))
    sampler = make_sampler(model, STEPS)

    @jit_fast
    def draw(params, source, ids, noise):
        texts = model.conditions(params, ids)
        null = jax.tree.map(lambda array: array[0], texts)
        texts = jax.tree.map(lambda array: array[1:], texts)
        if model.pooled_width:
            texts["time_ids"] = jnp.asarray(TIME_IDS[SIZED])
        latents = instruct_pix2pix.draw(
            functools.partial(model.denoise, params),
            noise,
            model.moments(params, source),
            texts,
            null,
            sampler=sampler,
            text_scale=TEXT_SCALE,
            image_scale=IMAGE_SCALE,
        )
        return latents, model.decode(params, latents)

    latents, images = draw(params, source, ids, noise)
    images = np.clip(np.asarray(images) / 2 + 0.5, 0, 1)
    return {"latents": np.asarray(latents), "images": images}


def whole_sample_torch(family: str, pipelines: Pipelines) -> Arrays:
    source, prompt, noise = sample_inputs(family)
    last = {}

    def keep(pipeline, step, timestep, tensors):
        last.update(tensors)
        return tensors

    options = {"callback_on_step_end": keep}
    if hasattr(pipelines.fine_tuned, "text_encoder_2"):
        height, width, top, left, *size = TIME_IDS[SIZED][0].astype(int).tolist()
        options = {
            "callback": lambda step, timestep, latents: last.update(latents=latents),
            "original_size": (height, width),
            "crops_coords_top_left": (top, left),
            "target_size": tuple(size),
            "height": size[0],
            "width": size[1],
        }
    images = pipelines.fine_tuned(
        prompt,
        image=source / 2 + 0.5,
        num_inference_steps=STEPS,
        guidance_scale=TEXT_SCALE,
        image_guidance_scale=IMAGE_SCALE,
        latents=_tensor(noise),
        output_type="np",
        **options,
    ).images
    return {"latents": _array(last["latents"]), "images": images}


COMPARISONS: dict[str, tuple[Callable[..., Arrays], Callable[..., Arrays]]] = {
    "unet": (unet, unet_torch),
    "autoencoder": (autoencoder, autoencoder_torch),
    "text": (text, text_torch),
    "schedule": (schedule, schedule_torch),
    "training": (training, training_torch),
    "sample": (whole_sample, whole_sample_torch),
}


def compute_torch(family: str, pipelines: Pipelines) -> dict[str, Arrays]:
    """PyTorch's arrays of every comparison."""
    import torch

    with torch.no_grad():
        return {
            name: theirs(family, pipelines) for name, (_, theirs) in COMPARISONS.items()
        }


def _conditions_torch(pipeline: Any, prompts: Any, time_ids: Any = None) -> Any:
    """Text states; of XL with the pooled embeddings, zeros for the empty prompt."""
    import torch

    if not hasattr(pipeline, "text_encoder_2"):
        return pipeline.text_encoder(_tokenize_torch(pipeline.tokenizer, prompts))[0]
    states, no_states, pooled, no_pooled = pipeline.encode_prompt(list(prompts))
    empty = torch.tensor([prompt == "" for prompt in prompts])
    found = {
        "states": torch.where(empty[:, None, None], no_states, states),
        "pooled": torch.where(empty[:, None], no_pooled, pooled),
    }
    return found if time_ids is None else found | {"time_ids": _tensor(time_ids)}


def _named(conditions: Any) -> dict[str, Any]:
    """Conditions as PyTorch's UNet takes them."""
    if not isinstance(conditions, dict):
        return {"encoder_hidden_states": conditions}
    pooled, time_ids = conditions["pooled"], conditions["time_ids"]
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return {"encoder_hidden_states": conditions["states"], "added_cond_kwargs": added}


def _only(params: Params, component: str) -> Params:
    return {component: params[component]}


def _tensor(array: np.ndarray) -> Any:
    """Channels first, where the array is a batch of images or latents."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor


def _array(tensor: Any) -> np.ndarray:
    return tensor.permute(0, 2, 3, 1).numpy()


def _tokenize_torch(tokenizer: Any, prompts: Any) -> Any:
    return tokenizer(
        list(prompts),
        max_length=tokenizer.model_max_length,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    ).input_ids
