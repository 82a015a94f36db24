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
import time
from collections.abc import Callable

import numpy as np
from architectures import SCHEDULE, UNETS
from turns import accelerator, in_turns, peak, resident, results, seconds_per_call

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
    width = UNETS[arguments.model]["cross_attention_dim"]

    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    return {
        "source_moments": normal(*shape),
        "target_moments": normal(*shape),
        "text_states": normal(batch, TOKENS, width),
        "null_states": normal(TOKENS, width),
    }


def ours(arguments: argparse.Namespace) -> tuple[Callable, Callable]:
    """Compiles our step and takes it once; returns `step(times)` and `peak()`."""
    from mvc_jax.training import runtime

    runtime.set_up("")
    import measure
    import programs

    options = programs.Options(
        family=arguments.model,
        batch=arguments.batch,
        size=8 * arguments.latents,
        remat=arguments.remat,
        attention=arguments.attention,
        dtype=arguments.precision,
    )
    built = programs.build("finetune", options, measure.mesh())
    return measure.repeated(*measure.compiled("finetune", built)), peak


def torch_s(arguments: argparse.Namespace) -> tuple[Callable, Callable]:
    """The same of PyTorch, as diffusers' training script writes it."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = UNet2DConditionModel(**UNETS[arguments.model]).to(device)
    scheduler = DDPMScheduler(**SCHEDULE)
    optimizer = torch.optim.Adam(unet.parameters(), lr=LEARNING_RATE)
    batch = cache(arguments, channels_last=False)
    batch = {key: torch.from_numpy(value).to(device) for key, value in batch.items()}
    half = torch.autocast(
        device, torch.bfloat16, enabled=arguments.precision == "bfloat16"
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
    return step, torch.cuda.max_memory_allocated if device == "cuda" else resident


def theirs(*, batch: int, family: str, size: int, on_cpu: bool = False):
    """The row of `accelerator.py`: PyTorch's rate, for the ratio to ours.

    Args:
      batch: examples.
      family: of the UNet.
      size: of the images in pixels.
      on_cpu: whether a CPU will do.

    Raises:
      ModuleNotFoundError: PyTorch is not installed, or not for this accelerator.
    """
    import torch

    if not torch.cuda.is_available() and not on_cpu:
        raise ModuleNotFoundError("PyTorch finds no GPU", name="torch")
    began = time.perf_counter()
    arguments = argparse.Namespace(
        model=family, batch=batch, latents=size // 8, precision="bfloat16"
    )
    step, memory = torch_s(arguments)
    first = time.perf_counter() - began
    seconds = seconds_per_call(step)
    yield {
        "setting": f"diffusers {batch}",
        "figure": batch / seconds,
        "unit": "examples/s",
        "memory_gib": memory() / 2**30,
        "note": f"PyTorch {torch.__version__}, without torch.compile; the first step "
        f"ended after {first:.0f} s",
    }


def torch_loss(unet, scheduler, batch: dict, half):
    """InstructPix2Pix's loss of one batch, in PyTorch."""
    import torch

    mean, log_variance = batch["target_moments"].chunk(2, dim=1)
    deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    latents = (mean + deviation * torch.randn_like(mean)) * SCALING_FACTOR
    noise = torch.randn_like(latents)
    size = len(latents)
    device = latents.device
    high = scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, high, (size,), device=device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    uniform = torch.rand(size, device=device)
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
