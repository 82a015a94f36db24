"""MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch.

There is one mixing ratio per batch, and partners are a permutation, as in the authors'
codes. Rows of weight zero are padding: they are unchanged and nobody's partner, and
their number does not affect the real rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key, Num


def partners(key: Key[Array, ""], weights: Float[Array, " B"]) -> Int32[Array, " B"]:
    """Draws a permutation of the rows with positive weight; others map to themselves.

    A row may be its own partner.
    """
    real = weights > 0
    count = len(weights)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(count))
    draws = jax.vmap(jax.random.uniform)(keys)
    shuffled = jnp.argsort(jnp.where(real, draws, 2.0))  # real rows first
    rank = jnp.cumsum(real) - 1
    chosen = shuffled[jnp.maximum(rank, 0)]
    return jnp.where(real, chosen, jnp.arange(count)).astype(jnp.int32)


def mixup(
    key: Key[Array, ""],
    images: Num[Array, "B H W C"],
    labels: Float[Array, "B K"],
    weights: Float[Array, " B"],
    *,
    alpha: float | int = 1.0,
) -> tuple[Num[Array, "B H W C"], Float[Array, "B K"]]:
    """Mixes images and labels: ratio * own + (1 - ratio) * partner's.

    Args:
      key: of this batch.
      images: of any range; uint8 results are rounded.
      labels: soft labels.
      weights: of the rows' losses; 0 for padding.
      alpha: ratio ~ Beta(alpha, alpha). The paper has 1 for CIFAR, 0.1 to 0.4 for
        ImageNet.
    """
    ratio_key, partner_key = jax.random.split(key)
    ratio = _draw_ratio(ratio_key, alpha)
    partner = partners(partner_key, weights)
    own = images.astype(jnp.float32)
    mixed = own * ratio + own[partner] * (1 - ratio)
    mixed = jnp.where((weights > 0)[:, None, None, None], mixed, own)
    if jnp.issubdtype(images.dtype, jnp.integer):
        mixed = jnp.round(mixed)
    return mixed.astype(images.dtype), _mix_labels(labels, partner, weights, ratio)


def cutmix(
    key: Key[Array, ""],
    images: Num[Array, "B H W C"],
    labels: Float[Array, "B K"],
    weights: Float[Array, " B"],
    *,
    alpha: float | int = 1.0,
) -> tuple[Num[Array, "B H W C"], Float[Array, "B K"]]:
    """Pastes a box of the partner into every image; mixes labels by its area.

    Args:
      key: of this batch.
      images: of any range.
      labels: soft labels.
      weights: of the rows' losses; 0 for padding.
      alpha: 1 - area ~ Beta(alpha, alpha), before the box is clipped at the border; 1
        in the paper.
    """
    ratio_key, place_key, partner_key = jax.random.split(key, 3)
    partner = partners(partner_key, weights)
    box = _draw_box(place_key, _draw_ratio(ratio_key, alpha), *images.shape[1:3])
    mixed = jnp.where(box[None, :, :, None], images[partner], images)
    return mixed, _mix_labels(labels, partner, weights, 1 - box.mean())


def _draw_ratio(key, alpha: float | int) -> Float[Array, ""]:
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha: above 0, not {alpha}")
    if alpha == 1:  # Beta(1, 1); uniform compiles much faster
        return jax.random.uniform(key)
    return jax.random.beta(key, alpha, alpha)


def _draw_box(key, ratio, height: int, width: int) -> Bool[Array, "H W"]:
    """A box of `1 - ratio` of the area around a random pixel, clipped at the border."""
    sides = jnp.array([height, width])
    size = (sides * jnp.sqrt(1 - ratio)).astype(jnp.int32)
    centre = jax.random.randint(key, (2,), jnp.zeros(2, int), sides)
    start, end = centre - size // 2, centre + size // 2
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    rows, columns = (y >= start[0]) & (y < end[0]), (x >= start[1]) & (x < end[1])
    return rows & columns


def _mix_labels(labels, partner, weights, ratio) -> Float[Array, "B K"]:
    mixed = labels * ratio + labels[partner] * (1 - ratio)
    return jnp.where((weights > 0)[:, None], mixed, labels)
