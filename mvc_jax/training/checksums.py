"""Checksums of arrays, computed on their devices: exact, and equal on any mesh.

Each 32-bit word is hashed together with its position, and the hashes are added modulo
2^32, so that the order of addition and the sharding do not matter. A change of one word
always changes the sum, as the hash is a bijection; changes of several words, or of
their positions, are missed with a probability of 2^-32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes
_WEYL = np.uint32(0x9E3779B9)
_BLOCK = 1 << 20  # words that NumPy adds at a time


def checksums(tree: Any) -> list[int]:
    """The checksum of every leaf, in the order of `jax.tree.leaves`.

    Each array is read once: on a CPU by NumPy, else on its own devices, by a program
    that is compiled for each shape. They run one at a time: hundreds of concurrent sums
    over devices can deadlock a CPU that is split into several fake devices.
    """
    return [
        _host_sum(np.asarray(leaf)) if _is_on_host(leaf) else int(_sum(leaf))
        for leaf in jax.tree.leaves(tree)
    ]


def _is_on_host(array: jax.Array) -> bool:
    """Whether NumPy can sum it in place, without a program for each shape."""
    platforms = {device.platform for device in array.devices()}
    return platforms == {"cpu"} and array.is_fully_addressable


def _host_sum(array: np.ndarray) -> int:
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    unsigned = np.dtype(_UNSIGNED[array.dtype.itemsize])
    words = np.ascontiguousarray(array).reshape(-1).view(unsigned)
    total = 0
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK].astype(np.uint32)
        position = np.arange(start, start + len(block)).astype(np.uint32)
        total += int(_mix(block + position * _WEYL).sum(dtype=np.uint64))
    return total % 2**32


@jax.jit
def _sum(array: jax.Array) -> UInt32[jax.Array, ""]:
    words = _words(array)
    strides = [math.prod(words.shape[axis + 1 :]) for axis in range(words.ndim)]
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += index * jnp.uint32(stride % 2**32)
    return _mix(words + position * _WEYL).sum(dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The array's bits as uint32: two words for a 64-bit element, else one."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize])
    return bits.astype(jnp.uint32)


def _mix(words: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """The finaliser of MurmurHash3: a permutation of the 32-bit words."""
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
