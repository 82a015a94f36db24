"""Image status: whether a drawn image is usable; and redraws of the others."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

STATUSES = ("ok", "NaN", "black", "constant")  # a status is an index into these
_TOLERANCE = 2  # grey levels


@dataclasses.dataclass
class Drawn:
    """Images of some recipes, in their order.

    Attributes:
      images: uint8 [N, H, W, 3].
      status: uint8 [N], indices into `STATUSES`.
    """

    images: np.ndarray
    status: np.ndarray


def image_status(
    latents: Float[Array, "B h w c"],
    images: Float[Array, "B H W 3"],
    pixels: UInt8[Array, "B H W 3"],
) -> UInt8[Array, " B"]:
    """The status of each image, an index into `STATUSES`.

    Args:
      latents: as sampled.
      images: decoded from them.
      pixels: the images in [0, 255]. Black and constant images are found within 2 grey
        levels, in every channel.
    """
    finite = jnp.isfinite(latents).all((1, 2, 3)) & jnp.isfinite(images).all((1, 2, 3))
    high, low = pixels.max((1, 2)), pixels.min((1, 2))  # by channel
    black = (high <= _TOLERANCE).all(-1)
    constant = (high - low <= _TOLERANCE).all(-1)
    status = jnp.where(black, 2, jnp.where(constant, 3, 0))
    return jnp.where(finite, status, 1).astype(jnp.uint8)


def redraw_unusable(
    draw: Callable[[Sequence[dict], int], Drawn],
    recipes: Sequence[dict],
    drawn: Drawn,
    max_redraws: int,
) -> list[dict]:
    """Draws unusable images again, in place.

    Args:
      draw: (recipes, number of the redraw from 1) -> images.
      recipes: of all images.
      drawn: all images, drawn once.
      max_redraws: maximum number of redraws of an image.

    Returns:
      a note for each image that was unusable at first: `{"index", "reason", "redraws",
      "kept"}`.
    """
    first = drawn.status.copy()
    redraws = np.zeros(len(recipes), int)
    for attempt in range(1, max_redraws + 1):
        unusable = np.flatnonzero(drawn.status)
        if not len(unusable):
            break
        again = draw([recipes[i] for i in unusable], attempt)
        drawn.images[unusable], drawn.status[unusable] = again.images, again.status
        redraws[unusable] = attempt
    return [
        {
            "index": recipes[i]["index"],
            "reason": STATUSES[first[i]],
            "redraws": int(redraws[i]),
            "kept": not drawn.status[i],
        }
        for i in np.flatnonzero(first).tolist()
    ]
