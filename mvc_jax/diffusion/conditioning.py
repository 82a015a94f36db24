"""Text states made of image embeddings, for the ablation (supplement, section 2).

A text-to-image UNet attends to L states of width D, while an image embedding is one
vector. How the vector becomes states is not in the supplement; what is here is ours.

Legend: B batch, L text tokens, D their width.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def embedding_states(
    embeddings: Float[Array, "B D"], states: Float[Array, "B L D"]
) -> Float[Array, "B L D"]:
    """Replaces the state of every token but BOS by an embedding.

    BOS keeps its state, which is the same for every text. The embedding is scaled to
    the mean norm of the caption's other states: a text encoder's last layer norm gives
    states of one size, a projection gives embeddings of another.

    Args:
      embeddings: of images; an embedding of 0 stays 0.
      states: of the images' captions.
    """
    length = jnp.linalg.norm(states[:, 1:], axis=-1).mean(axis=1)[:, None]
    norm = jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
    scaled = embeddings * length / jnp.where(norm > 0, norm, 1.0)
    rest = jnp.broadcast_to(scaled[:, None], states[:, 1:].shape)
    return jnp.concatenate([states[:, :1], rest], axis=1)


def difference_states(
    embeddings: Float[Array, "B D"],
    others: Float[Array, "B D"],
    states: Float[Array, "B L D"],
) -> Float[Array, "B L D"]:
    """An editing direction, E(I1) - E(I2) (supplement, section 2), as text states.

    The `embedding_states` of the difference. For two equal images every state but that
    of BOS is 0.

    Args:
      embeddings: E(I1), of the sources.
      others: E(I2), of other images.
      states: of the sources' captions.
    """
    return embedding_states(embeddings - others, states)
