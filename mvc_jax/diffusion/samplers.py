"""Sampling: scans over the steps of a solver, guided in an interval of noise levels."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mvc_jax.errors import require

Predict = Callable[[Array, Array], Array]  # (latents, timesteps [B]) -> prediction
WHOLE = (0.0, 1.0)


@runtime_checkable
class Solver(Protocol):
    """A walk of S steps from noise to latents; i is an index into `timesteps`.

    Attributes:
      timesteps: int32 or float32, what the network is told, noisiest first.
      num_train_timesteps: T.
    """

    timesteps: Int[np.ndarray, " S"] | Float[np.ndarray, " S"]
    num_train_timesteps: int

    def start(self, noise: Float[Array, "B h w c"]) -> Any:
        """The carry of the walk from standard normal noise."""

    def inputs(self, carry: Any, i: Int[Array, ""]) -> Float[Array, "B h w c"]:
        """The latents that the network sees at step i."""

    def step(
        self, carry: Any, prediction: Float[Array, "B h w c"], i: Int[Array, ""]
    ) -> Any:
        """The carry after step i."""

    def latents(self, carry: Any) -> Float[Array, "B h w c"]:
        """The latents that the walk ended at."""


def sample(
    guided: Predict,
    solver: Solver,
    noise: Float[Array, "B h w c"],
    *,
    unguided: Predict | None = None,
    guidance_interval: tuple[float, float] = WHOLE,
) -> Float[Array, "B h w c"]:
    """Walks from noise to latents.

    The timesteps are known before it is compiled, so that each stretch of the walk is a
    scan of its own, and what guidance would cost outside its interval is not computed.

    Args:
      guided: the prediction, guidance included.
      solver: of the walk.
      noise: standard normal.
      unguided: the prediction outside the interval; needed unless that is all.
      guidance_interval: as `stretches` takes it.
    """
    timesteps = jnp.asarray(solver.timesteps)
    carry = solver.start(noise)
    for first, behind, inside in stretches(solver, guidance_interval):
        predict = guided if inside else unguided

        def body(carry, i, predict=predict):
            latents = solver.inputs(carry, i)
            told = jnp.broadcast_to(timesteps[i], latents.shape[:1])
            return solver.step(carry, predict(latents, told), i), None

        carry, _ = jax.lax.scan(body, carry, jnp.arange(first, behind))
    return solver.latents(carry)


def stretches(
    solver: Solver, guidance_interval: tuple[float, float]
) -> list[tuple[int, int, bool]]:
    """The walk cut where it enters and where it leaves the interval of guidance.

    Guidance in a limited interval is of arXiv 2404.07724; that interval is one of noise
    levels sigma, this one of their order t / T.

    Args:
      solver: of the walk.
      guidance_interval: (low, high); guided where low <= t / T <= high.

    Returns:
      (first step, step behind the last, guided or not), one after the other.
    """
    low, high = guidance_interval
    level = np.asarray(solver.timesteps, np.float64) / solver.num_train_timesteps
    inside = (low <= level) & (level <= high)
    cuts = [0, *np.flatnonzero(np.diff(inside)) + 1, len(inside)]
    return [
        (int(first), int(behind), bool(inside[first]))
        for first, behind in zip(cuts[:-1], cuts[1:], strict=True)
    ]


def check_interval(guidance_interval: Sequence[float]) -> None:
    """Refuses a `config.generate.guidance_interval` that `stretches` cannot take."""
    interval = tuple(guidance_interval)
    require(
        len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1,
        "config.generate.guidance_interval",
        wanted="two shares of the noise levels, ascending, from 0 to 1",
        got=interval,
        fix="(0.0, 1.0) guides at every step.",
    )


def network_rows(
    solver: Solver, guidance_interval: tuple[float, float] = WHOLE, branches: int = 3
) -> int:
    """Rows of network batches for one image: `branches` a guided step, 1 another."""
    return sum(
        (behind - first) * (branches if inside else 1)
        for first, behind, inside in stretches(solver, guidance_interval)
    )
