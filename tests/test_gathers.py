"""What a TPU computes instead of gathers and scatters equals them, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvc_jax import augment
from mvc_jax.augment import gathers, geometry, operations, shears

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 20, 31, 3), dtype=np.uint8)
IMAGES[1] = np.arange(31, dtype=np.uint8)[None, :, None] * 8 + 15  # up to 255
IMAGES[2] = 255


def indices(*shape: int, below: int) -> np.ndarray:
    return RNG.integers(0, below, shape, dtype=np.int32)


ARGUMENTS = {
    "pixels": (IMAGES, indices(3, 20, 31, below=20), indices(3, 20, 31, below=31)),
    "crop": (IMAGES, indices(3, 20, below=20), indices(3, 31, below=31)),
    "histogram": (IMAGES,),
    "look_up": (RNG.integers(0, 256, (3, 3, 256), dtype=np.uint8), IMAGES),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_products_equal_gathers(name, channels):
    arguments = [
        x[:, :channels] if x.shape[1:] == (3, 256) else x[..., :channels]
        if x.shape[1:] == IMAGES.shape[1:] else x
        for x in ARGUMENTS[name]
    ]  # fmt: skip
    gathered = jax.jit(jax.vmap(getattr(gathers, name)))(*arguments)
    product = jax.jit(jax.vmap(getattr(gathers, f"{name}_by_product")))(*arguments)
    assert gathered.dtype == product.dtype
    np.testing.assert_array_equal(gathered, product)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_products_equal_rows_and_columns(axis, dtype):
    image, index = IMAGES[0].astype(dtype), indices(9, below=20)
    expected = image.take(index, axis)
    for function in (gathers.along, gathers.along_by_product):
        found = jax.jit(function, static_argnums=2)(image, index, axis)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("degrees", "most", "shift"), [(9, 0.09, 4.2), (30, 0.3, 9.0), (135, 0.99, 0.0)]
)
def test_shears_equal_indices(degrees, most, shift):
    """Every move of a policy both ways, of an image that is not square."""
    named = {"Rotate": degrees, "ShearX": most, "ShearY": most}
    named |= {"TranslateX": shift, "TranslateY": shift}
    moves = [(name, sign * x) for name, x in named.items() for sign in (1, -1)]
    table = operations.table(moves, 20, 31, "nearest")
    assert table.bounds and table.rows.map.shape == (11, 6)

    def by_shears(map_, shear):
        return shears.nearest(jnp.asarray(IMAGES[0]), map_, shear, table.bounds, 128)

    def by_indices(map_, _):
        return geometry.nearest(jnp.asarray(IMAGES[0]), map_[None], 128)

    found, expected = (
        jax.jit(jax.vmap(function))(table.rows.map, table.rows.shear)
        for function in (by_shears, by_indices)
    )
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found, axis=0)) == (11 if shift else 7)


def test_maps_that_are_far_from_shears_have_no_bounds():
    assert operations.table([("Rotate", 135)], 200, 200, "nearest").bounds is None
    assert operations.table([("ShearX", 0.99)], 300, 9, "nearest").bounds is None
    assert operations.table([("Rotate", 9)], 20, 31, "bilinear").bounds is None
    assert operations.table([("Color", 0.5)], 20, 31, "nearest").bounds is None


@pytest.mark.parametrize("name", ["randaugment", "autoaugment_imagenet"])
def test_a_program_for_a_tpu_reads_nothing_but_rows_of_the_table_by_index(name):
    """The target of the compilation decides, not the devices of this machine."""
    policy = jax.jit(jax.vmap(augment.policy(name)))
    keys = jax.random.split(jax.random.key(0), 3)
    traced = policy.trace(keys, jnp.asarray(IMAGES))
    found = {}
    for platform in ("tpu", "cpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        lines = text.splitlines()
        reads = [line for line in lines if '"stablehlo.gather"' in line]
        pixels = any("ui8>" in line.partition("->")[2] for line in reads)
        writes = [line for line in lines if '"stablehlo.scatter"' in line]
        counts = any("indices_are_sorted = false" in line for line in writes)
        found[platform] = (pixels, counts)
    assert found == {"tpu": (False, False), "cpu": (True, True)}
