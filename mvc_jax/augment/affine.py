"""Random rotation, zoom and shift, for small images."""

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
    """Transforms one image by a random similarity, with bilinear interpolation.

    Pixels from outside the image take the value of the nearest border pixel. vmap it
    over a batch.

    Args:
      key: of this image.
      image: of any range.
      degrees: the rotation is uniform in [-degrees, degrees].
      zoom: the scale is uniform in [1 - zoom, 1 + zoom].
      shift: the shift along each axis is uniform in [-shift, shift] times the side.
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
