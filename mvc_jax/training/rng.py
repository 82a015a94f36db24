"""Device randomness as a function of (seed, purpose, index); no key in any state."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def purpose_key(seed: int, purpose: str) -> Key[Array, ""]:
    """The root key of one use of randomness, e.g. `"finetune"` or `"noise"`."""
    tag = zlib.crc32(purpose.encode())
    return jax.random.fold_in(jax.random.key(seed), tag)


def example_keys(key: Key[Array, ""], indices: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key an example, whatever the batch it is in and the device it is on."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def step_keys(
    key: Key[Array, ""], step: Int[Array, ""], count: int
) -> Key[Array, " B"]:
    """One key for each of the `count` examples of a step's batch."""
    return example_keys(jax.random.fold_in(key, step), jnp.arange(count))


def normal_like(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Array:
    """Standard normal draws [B, *shape], one key an example."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def use_keys(keys: Key[Array, " B"], uses: int) -> list[Key[Array, " B"]]:
    """Splits each example's key into `uses` keys, so that none is used twice."""
    split = jax.vmap(lambda key: jax.random.split(key, uses))(keys)
    return [split[:, use] for use in range(uses)]


def uniform(keys: Key[Array, " B"]) -> Float[Array, " B"]:
    """One draw in [0, 1) an example."""
    return jax.vmap(jax.random.uniform)(keys)


def integers(keys: Key[Array, " B"], stop: int) -> Int[Array, " B"]:
    """One draw in [0, stop) an example."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, stop))(keys)
