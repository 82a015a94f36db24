"""The timesteps at which each sampler calls the network; known before compilation.

A spacing is what PyTorch's diffusers calls `timestep_spacing` (Lin et al., arXiv
2305.08891, table 2), with an offset of 1. It differs between its schedulers:

              trailing       leading                         linspace
  ddim        from T - 1     from (S - 1) (T // S) + 1       from T - 1 to 0
  euler       the same       the same                        the same, not rounded
  dpmpp_2m    the same       from S (T // (S + 1)) + 1       from T - 1, without 0

Samples start as pure noise, so the first timestep should be one of (nearly) pure noise.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from mvc_jax.diffusion.guidance_interval import segments
from mvc_jax.errors import UserError

SPACINGS = ("trailing", "leading", "linspace")
AUTO = "auto"
DEFAULT = "trailing"  # what `auto` stands for
# What it was before it could be chosen.
EARLIER = {"ddim": "leading", "euler": "leading", "dpmpp_2m": "linspace"}
_LEAST = 0.85  # of T: the first timestep, and what DDIM's steps cover
_BRANCHES = 3  # predictions of a guided step: `guidance.image_text_guidance`


def trailing(num_train_timesteps: int, steps: int) -> Int[np.ndarray, " S"]:
    """From T - 1 down by T / S: diffusers' `trailing`, of all its schedulers.

    At some counts, as 61 of 1000, rounding gives theirs one more, timestep -1.
    """
    spaced = np.arange(num_train_timesteps, 0, -num_train_timesteps / steps)
    return spaced[:steps].round().astype(np.int32) - np.int32(1)


def leading(num_train_timesteps: int, steps: int) -> Int[np.ndarray, " S"]:
    """From (S - 1) (T // S) + 1 down to 1: diffusers' `leading`, with offset 1."""
    spacing = num_train_timesteps // steps
    return (np.arange(steps) * spacing)[::-1].astype(np.int32) + np.int32(1)


def _leading_without_first(
    num_train_timesteps: int, steps: int
) -> Int[np.ndarray, " S"]:
    """`leading` of S + 1 steps without the last: that of diffusers' DPM-Solver."""
    return leading(num_train_timesteps, steps + 1)[:-1]


def linspace(num_train_timesteps: int, steps: int) -> Int[np.ndarray, " S"]:
    """Evenly spaced from T - 1 down, without the final 0: that of its DPM-Solver."""
    timesteps = np.linspace(0, num_train_timesteps - 1, steps + 1).round()
    return timesteps[:0:-1].astype(np.int32)


def _linspace_exact(num_train_timesteps: int, steps: int) -> Float[np.ndarray, " S"]:
    """Evenly spaced from T - 1 down to 0, not rounded: diffusers' Euler."""
    return np.linspace(0, num_train_timesteps - 1, steps, dtype=np.float32)[::-1]


def _linspace_rounded(num_train_timesteps: int, steps: int) -> Int[np.ndarray, " S"]:
    """The same, rounded: diffusers' DDIM."""
    exact = np.linspace(0, num_train_timesteps - 1, steps)[::-1]
    return exact.round().astype(np.int32)


_TIMESTEPS: dict[str, dict[str, Callable[[int, int], np.ndarray]]] = {
    "ddim": {
        "trailing": trailing,
        "leading": leading,
        "linspace": _linspace_rounded,
    },
    "euler": {
        "trailing": trailing,
        "leading": leading,
        "linspace": _linspace_exact,
    },
    "dpmpp_2m": {
        "trailing": trailing,
        "leading": _leading_without_first,
        "linspace": linspace,
    },
}


def timesteps_of(
    sampler: str, steps: int, spacing: str = AUTO, num_train_timesteps: int = 1000
) -> Int[np.ndarray, " S"] | Float[np.ndarray, " S"]:
    """The timesteps of a sampler, from the noisiest down.

    Args:
      sampler: `ddim`, `euler` or `dpmpp_2m`.
      steps: S, from 1 to T - 1.
      spacing: one of `SPACINGS`, or `AUTO`.
      num_train_timesteps: T; by default that of every Stable Diffusion.
    """
    return _TIMESTEPS[sampler][named(spacing)](num_train_timesteps, steps)


def first_step(steps: int, strength: float) -> int:
    """The first of S steps that is taken of a source that is noised to a strength.

    As diffusers' `StableDiffusionImg2ImgPipeline` counts: `int(S strength)` are taken.

    Args:
      steps: S.
      strength: in [0, 1]; 1 takes all, 0 none.
    """
    return steps - min(int(steps * strength), steps)


def named(spacing: str) -> str:
    """What a spacing is called: `AUTO` is the default one."""
    return DEFAULT if spacing == AUTO else spacing


def start_in_words(
    sampler: str, steps: int, spacing: str = AUTO, num_train_timesteps: int = 1000
) -> str:
    """Where samples start, for a log; the arguments are those of `timesteps_of`."""
    first = timesteps_of(sampler, steps, spacing, num_train_timesteps)[0]
    return (
        f"samples start at timestep {first:g} of 0 to {num_train_timesteps - 1} "
        f"({sampler}, {steps} steps, {named(spacing)})"
    )


def require_noise(
    sampler: str, steps: int, spacing: str = AUTO, num_train_timesteps: int = 1000
) -> None:
    """Checks that a sample starts in noise and that its steps take all of it away.

    Below 0.85 T an image of which the noise is a part, instead of all, is expected: at
    T / 2, Stable Diffusion's noisy latents have half of the image in them. And DDIM, in
    PyTorch as here, goes down by T // S in each step, whatever the spacing: with 501
    `trailing` steps, half of the way.

    The arguments are those of `timesteps_of`.

    Raises:
      UserError: neither; it names the nearest numbers of steps that do.
    """
    why = _lacking_noise(sampler, steps, spacing, num_train_timesteps)
    if not why:
        return
    fine = [
        count
        for count in range(1, num_train_timesteps)
        if not _lacking_noise(sampler, count, spacing, num_train_timesteps)
    ]
    fewer, more = [n for n in fine if n < steps], [n for n in fine if n > steps]
    nearest = fewer[-1:] + more[:1]
    other = next(
        (
            f", or --config.generate.timestep_spacing={name}"
            for name in SPACINGS
            if not _lacking_noise(sampler, steps, name, num_train_timesteps)
        ),
        "",
    )
    raise UserError(
        "config.generate.steps",
        wanted=f"steps from noise: from timestep {_LEAST * num_train_timesteps:g} of "
        f"{num_train_timesteps} or above, down to 0",
        got=f"{steps} of {sampler}, {named(spacing)}, which {why}",
        fix=f"Use {' or '.join(map(str, nearest)) or 'another spacing'}{other}.",
    )


def _lacking_noise(sampler: str, steps: int, spacing: str, trained: int) -> str:
    """What is wrong with such steps, as a clause; "": nothing."""
    timesteps = timesteps_of(sampler, steps, spacing, trained)
    first, last = float(timesteps[0]), float(timesteps[-1])
    if not _LEAST * trained <= first < trained:
        return f"start at timestep {first:g}"
    taken = (steps - 1) * (trained // steps)
    if sampler == "ddim" and taken < _LEAST * (first - last):
        return (
            f"go down by {trained // steps} each, {taken} in all, from timestep "
            f"{first:g} to {last:g}"
        )
    return ""


def evaluations(
    sampler: str,
    steps: int,
    guidance_interval: tuple[float, float],
    spacing: str = AUTO,
    num_train_timesteps: int = 1000,
    strength: float = 1.0,
) -> int:
    """Predictions of the UNet for one image, of all branches of guidance together.

    Args:
      sampler: as `timesteps_of` takes it.
      steps: S.
      guidance_interval: as `segments` takes it; outside it there is one branch.
      spacing: as `timesteps_of` takes it.
      num_train_timesteps: T; by default that of every Stable Diffusion.
      strength: as `first_step` takes it.
    """
    timesteps = timesteps_of(sampler, steps, spacing, num_train_timesteps)
    timesteps = timesteps[first_step(steps, strength) :]
    if not len(timesteps):
        return 0
    parts = segments(timesteps, num_train_timesteps, guidance_interval)
    return sum(
        (stop - start) * (_BRANCHES if guided else 1) for start, stop, guided in parts
    )
