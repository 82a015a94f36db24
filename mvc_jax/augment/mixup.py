"""MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899): images and labels of a batch.

One share for a batch, partners by a permutation, as in the authors' codes. Rows of
weight zero are padding: nobody's partner, and unchanged. What real rows become does not
depend on how many of them come behind the real ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key, Num


def partners(key: Key[Array, ""], weights: Float[Array, " B"]) -> Int32[Array, " B"]:
    """A random permutation of the rows with weight above zero; the others stay.

    A row may be its own partner.
    """
    real = weights > 0
    count = len(weights)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(count))
    draws = jax.vmap(jax.random.uniform)(keys)
    shuffled = jnp.argsort(jnp.where(real, draws, 2.0))  # the real ones first
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
    """share * own + (1 - share) * partner's, for images and labels.

    Args:
      images: any range; uint8 ones are rounded.
      labels: soft.
      weights: of the rows' losses.
      alpha: share ~ Beta(alpha, alpha). The paper has 1 for CIFAR, 0.1 to 0.4 for
        ImageNet.
    """
    share_key, partner_key = jax.random.split(key)
    share = _share(share_key, alpha)
    partner = partners(partner_key, weights)
    own = images.astype(jnp.float32)
    mixed = own * share + own[partner] * (1 - share)
    mixed = jnp.where((weights > 0)[:, None, None, None], mixed, own)
    if jnp.issubdtype(images.dtype, jnp.integer):
        mixed = jnp.round(mixed)
    return mixed.astype(images.dtype), _labels(labels, partner, weights, share)


def cutmix(
    key: Key[Array, ""],
    images: Num[Array, "B H W C"],
    labels: Float[Array, "B K"],
    weights: Float[Array, " B"],
    *,
    alpha: float | int = 1.0,
) -> tuple[Num[Array, "B H W C"], Float[Array, "B K"]]:
    """A box of every image shows its partner; labels are mixed by its area.

    Args:
      images: any range.
      labels: soft.
      weights: of the rows' losses.
      alpha: 1 - area ~ Beta(alpha, alpha), before the box is cut at the border; 1 in
        the paper.
    """
    share_key, place_key, partner_key = jax.random.split(key, 3)
    partner = partners(partner_key, weights)
    box = _box(place_key, _share(share_key, alpha), *images.shape[1:3])
    mixed = jnp.where(box[None, :, :, None], images[partner], images)
    return mixed, _labels(labels, partner, weights, 1 - box.mean())


def _share(key, alpha: float | int) -> Float[Array, ""]:
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha: above 0, not {alpha}")
    if alpha == 1:  # Beta(1, 1), which compiles at once
        return jax.random.uniform(key)
    return jax.random.beta(key, alpha, alpha)


def _box(key, share, height: int, width: int) -> Bool[Array, "H W"]:
    """A box of `1 - share` of the area about a random pixel, cut at the border."""
    sides = jnp.array([height, width])
    size = (sides * jnp.sqrt(1 - share)).astype(jnp.int32)
    centre = jax.random.randint(key, (2,), jnp.zeros(2, int), sides)
    start, end = centre - size // 2, centre + size // 2
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    rows, columns = (y >= start[0]) & (y < end[0]), (x >= start[1]) & (x < end[1])
    return rows & columns


def _labels(labels, partner, weights, share) -> Float[Array, "B K"]:
    mixed = labels * share + labels[partner] * (1 - share)
    return jnp.where((weights > 0)[:, None], mixed, labels)
