"""The fine-tuning step: ours against PyTorch diffusers' UNet.

    python benchmarks/finetune_step.py

The whole InstructPix2Pix step from cached moments: posterior sample, noise, dropped
conditions, the source on the channel axis, UNet forward and backward, clipping by the
global norm, Adam. Both sides have the same architecture, shapes and precision. Each
runs in a process of its own with all cores, and they take turns, so that other load on
the machine affects both.

On an accelerator only ours runs: Stable Diffusion 1.5's architecture with random
weights in bfloat16 at 64x64 latents, with TFLOP/s by 0.803 TFLOP per example forward
and twice that backward.
"""

import argparse
import functools
from collections.abc import Callable

import numpy as np
from architectures import SCHEDULE, TEXT_WIDTH, UNETS
from turns import accelerator, in_turns, peak, resident, results

TOKENS = 77
FORWARD_TFLOP = {64: 0.803, 32: 0.180}  # an example, SD 1.5, by side of its latents
SCALING_FACTOR, LEARNING_RATE, DROP_RATE, MAX_NORM = 0.18215, 1e-4, 0.05, 1.0


def main() -> None:
    arguments = parse()
    sides = {"ours": ours, "torch": torch_s}
    if accelerator():
        sides.pop("torch")
    compiling, seconds, memory = in_turns(sides, arguments)
    print(table(arguments, compiling, seconds, memory))


def parse() -> argparse.Namespace:
    fast = accelerator()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=UNETS, default="sd15" if fast else "small")
    parser.add_argument("--batch", type=int, default=32 if fast else 4)
    parser.add_argument("--latents", type=int, default=64 if fast else 32)
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="bfloat16" if fast else "float32",
    )
    parser.add_argument("--attention", default="auto", help="ours: auto, xla, ...")
    parser.add_argument("--remat", default="none", help="ours: none, blocks, full")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=20 if fast else 3, help="a turn")
    return parser.parse_args()


def cache(arguments: argparse.Namespace, *, channels_last: bool) -> dict:
    """A random batch of the arrays that `encode` caches."""
    rng = np.random.default_rng(0)
    side, batch = arguments.latents, arguments.batch
    shape = (batch, side, side, 8) if channels_last else (batch, 8, side, side)

    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    return {
        "source_moments": normal(*shape),
        "target_moments": normal(*shape),
        "text_states": normal(batch, TOKENS, TEXT_WIDTH),
        "null_states": normal(TOKENS, TEXT_WIDTH),
    }


def ours(arguments: argparse.Namespace) -> tuple[Callable, Callable]:
    """Compiles our step and takes it once; returns `step(times)` and `peak()`."""
    from mvc_jax.training import runtime

    runtime.set_up("")
    import jax

    from mvc_jax.finetune import train_step
    from mvc_jax.models.stable_diffusion import StableDiffusion
    from mvc_jax.training import optim, sharding
    from mvc_jax.training.loop import create_state

    configs = {
        "unet": UNETS[arguments.model],
        "vae": {"latent_channels": 4, "scaling_factor": SCALING_FACTOR},
        "scheduler": SCHEDULE,
    }
    mesh = sharding.make_mesh()
    model = StableDiffusion(
        configs,
        tokenizer=None,
        dtype=arguments.precision,
        attention=arguments.attention,
        remat=arguments.remat,
        mesh=mesh,
    )
    tx = optim.adam(LEARNING_RATE, max_norm=MAX_NORM)
    state = create_state(random_params(model.shapes("unet")), tx, mesh)
    batch = cache(arguments, channels_last=True)
    batch["weight"] = np.ones(arguments.batch, np.float32)
    batch = {
        key: jax.device_put(
            value,
            sharding.replicated(mesh)
            if key == "null_states"
            else sharding.batch_sharding(mesh),
        )
        for key, value in batch.items()
    }
    step_fn = jax.jit(
        functools.partial(
            train_step,
            model=model,
            tx=tx,
            key=jax.random.key(0),
            schedule=optim.schedule("constant", LEARNING_RATE, warmup=0, steps=1),
            drop_rate=DROP_RATE,
        ),
        donate_argnums=0,
    )
    state, metrics = jax.block_until_ready(step_fn(state, batch))

    def step(times: int) -> None:
        nonlocal state, metrics
        for _ in range(times):
            state, metrics = step_fn(state, batch)
        assert np.isfinite(float(metrics["loss"]))
        jax.block_until_ready(state)

    return step, peak


def random_params(shapes):
    """Normal weights (0.02) for a tree of shapes, created on the device."""
    import jax

    draw = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape), static_argnums=1
    )
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [draw(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def torch_s(arguments: argparse.Namespace) -> tuple[Callable, Callable]:
    """The same of PyTorch, as diffusers' training script writes it."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNETS[arguments.model])
    scheduler = DDPMScheduler(**SCHEDULE)
    optimizer = torch.optim.Adam(unet.parameters(), lr=LEARNING_RATE)
    batch = cache(arguments, channels_last=False)
    batch = {key: torch.from_numpy(value) for key, value in batch.items()}
    half = torch.autocast(
        "cpu", torch.bfloat16, enabled=arguments.precision == "bfloat16"
    )

    def step(times: int) -> None:
        for _ in range(times):
            loss = torch_loss(unet, scheduler, batch, half)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        assert np.isfinite(loss.item())

    step(1)
    return step, resident


def torch_loss(unet, scheduler, batch: dict, half):
    """InstructPix2Pix's loss of one batch, in PyTorch."""
    import torch

    mean, log_variance = batch["target_moments"].chunk(2, dim=1)
    deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    latents = (mean + deviation * torch.randn_like(mean)) * SCALING_FACTOR
    noise = torch.randn_like(latents)
    size = len(latents)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (size,))
    noisy = scheduler.add_noise(latents, noise, timesteps)
    uniform = torch.rand(size)
    states = torch.where(
        (uniform < 2 * DROP_RATE)[:, None, None],
        batch["null_states"],
        batch["text_states"],
    )
    dropped = (uniform >= DROP_RATE) & (uniform < 3 * DROP_RATE)
    source = batch["source_moments"].chunk(2, dim=1)[0]
    source = torch.where(dropped[:, None, None, None], 0.0, source)
    with half:
        prediction = unet(torch.cat([noisy, source], dim=1), timesteps, states).sample
    return torch.nn.functional.mse_loss(prediction.float(), noise)


def table(
    arguments: argparse.Namespace,
    compiling: dict[str, float],
    seconds: dict[str, list[float]],
    memory: dict[str, float],
) -> str:
    """Markdown: settings, one row a side, the ratio; TFLOP/s where they are known."""
    lines = [results(arguments, compiling, seconds, memory)]
    flop = FORWARD_TFLOP.get(arguments.latents)
    if arguments.model == "sd15" and flop:
        rate = arguments.batch / float(np.median(seconds["ours"]))
        lines.append(f"\nours: {3 * flop * rate:.1f} TFLOP/s")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
