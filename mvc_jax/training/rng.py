"""Random keys as functions of (seed, purpose, index); no state contains a key."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def purpose_key(seed: int, purpose: str) -> Key[Array, ""]:
    """The root key for one purpose, e.g. `"finetune"` or `"noise"`."""
    tag = zlib.crc32(purpose.encode())
    return jax.random.fold_in(jax.random.key(seed), tag)


def example_keys(key: Key[Array, ""], indices: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key per example index, independent of the batch and the device."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def for_purpose(keys: Key[Array, " B"], purpose: str) -> Key[Array, " B"]:
    """Each example's key for one more purpose than those it is used for itself."""
    tag = zlib.crc32(purpose.encode())
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, tag)


def step_keys(
    key: Key[Array, ""], step: Int[Array, ""], count: int
) -> Key[Array, " B"]:
    """One key for each of the `count` examples of a step's batch."""
    return example_keys(jax.random.fold_in(key, step), jnp.arange(count))


def normal_like(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Array:
    """Standard normal samples [B, *shape], from one key per example."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def use_keys(keys: Key[Array, " B"], uses: int) -> list[Key[Array, " B"]]:
    """Splits each example's key into `uses` keys, one for each use of randomness."""
    split = jax.vmap(lambda key: jax.random.split(key, uses))(keys)
    return [split[:, use] for use in range(uses)]


def uniform(keys: Key[Array, " B"]) -> Float[Array, " B"]:
    """One sample in [0, 1) per example."""
    return jax.vmap(jax.random.uniform)(keys)


def integers(keys: Key[Array, " B"], stop: int) -> Int[Array, " B"]:
    """One integer in [0, stop) per example."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, stop))(keys)
