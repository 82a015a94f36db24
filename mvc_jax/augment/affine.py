"""Classic augmentation for small images: a random rotation, zoom and shift."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def random_affine(
    key: Key[Array, ""],
    image: Float[Array, "H W C"],
    *,
    degrees: float = 15.0,
    zoom: float = 0.1,
    shift: float = 0.1,
) -> Float[Array, "H W C"]:
    """One image under a random similarity, bilinear; what comes in from outside is the
    border's nearest pixel. vmap it over a batch.

    Args:
      key: of this image.
      image: any range.
      degrees: the rotation is uniform in [-degrees, degrees].
      zoom: the scale is uniform in [1 - zoom, 1 + zoom].
      shift: uniform in [-shift, shift] times the side, along each axis.
    """
    height, width, _ = image.shape
    draws = jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)
    angle, scale = jnp.deg2rad(degrees) * draws[0], 1.0 + zoom * draws[1]
    centre = jnp.array([height - 1, width - 1]) / 2.0
    offset = centre + shift * draws[2:] * jnp.array([height, width])
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    y, x = (y - offset[0]) / scale, (x - offset[1]) / scale
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    coordinates = jnp.stack(
        [centre[0] + cos * y - sin * x, centre[1] + sin * y + cos * x]
    )

    def one_channel(channel):
        return jax.scipy.ndimage.map_coordinates(
            channel, coordinates, order=1, mode="nearest"
        )

    return jax.vmap(one_channel, in_axes=-1, out_axes=-1)(image)
