"""InfoNCE, the contrastive loss of CLIP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mvc_jax.models.clip import normalize


def info_nce(
    images: Float[Array, "B P"],
    texts: Float[Array, "B P"],
    groups: Int[Array, " B"],
    logit_scale: Float[Array, ""],
    weight: Float[Array, " B"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Symmetric InfoNCE between images and their texts (arXiv 2103.00020, figure 3).

    A batch of a small dataset has the same text more than once. All of its images are
    positives, with equal probability (as in UniCL, arXiv 2204.03610, equation 3).

    Args:
      images: embeddings of the images.
      texts: embeddings of their texts.
      groups: equal for equal texts.
      logit_scale: logarithm of the scale, which is clipped to 100, as in CLIP.
      weight: of the examples; one with zero weight is neither positive nor negative.

    Returns:
      the loss, and the accuracy: the fraction of images whose nearest text is theirs.
    """
    valid = weight > 0
    scale = jnp.exp(jnp.minimum(logit_scale, jnp.log(100.0)))
    logits = scale * normalize(images) @ normalize(texts).T
    same = (groups[:, None] == groups[None]) & valid[None]
    target = same / jnp.maximum(same.sum(axis=1, keepdims=True), 1)

    def cross_entropy(logits):
        logits = jnp.where(valid[None], logits, -1e9)
        return -(target * jax.nn.log_softmax(logits)).sum(axis=1)

    losses = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
    nearest = jnp.argmax(jnp.where(valid[None], logits, -jnp.inf), axis=1)
    correct = groups[nearest] == groups
    total = jnp.maximum(weight.sum(), 1e-8)
    return (losses * weight).sum() / total, (correct * weight).sum() / total
