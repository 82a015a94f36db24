"""What CLIP is trained on: InfoNCE between images and texts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mvc_jax.models.clip import normalised


def info_nce(
    images: Float[Array, "B P"],
    texts: Float[Array, "B P"],
    groups: Int[Array, " B"],
    logit_scale: Float[Array, ""],
    weight: Float[Array, " B"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Symmetric InfoNCE between images and their texts (arXiv 2103.00020, figure 3).

    A small dataset has the same text more than once in a batch. All of them are right,
    in equal shares (as UniCL has it, arXiv 2204.03610, equation 3).

    Args:
      images: embeddings.
      texts: of the text of each image.
      groups: equal for equal texts.
      logit_scale: a logarithm; as in CLIP, it counts up to that of 100.
      weight: of the examples; one without weight is no example, nor a wrong answer.

    Returns:
      the loss, and the share of images whose nearest text is theirs.
    """
    there = weight > 0
    scale = jnp.exp(jnp.minimum(logit_scale, jnp.log(100.0)))
    logits = scale * normalised(images) @ normalised(texts).T
    same = (groups[:, None] == groups[None]) & there[None]
    shares = same / jnp.maximum(same.sum(axis=1, keepdims=True), 1)

    def cross_entropy(logits):
        logits = jnp.where(there[None], logits, -1e9)
        return -(shares * jax.nn.log_softmax(logits)).sum(axis=1)

    losses = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
    nearest = jnp.argmax(jnp.where(there[None], logits, -jnp.inf), axis=1)
    right = groups[nearest] == groups
    total = jnp.maximum(weight.sum(), 1e-8)
    return (losses * weight).sum() / total, (right * weight).sum() / total
