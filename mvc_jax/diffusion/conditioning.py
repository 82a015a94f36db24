"""What takes the place of a caption's text states in the ablation (supplement, 2).

A text-to-image UNet attends to L states of width D. An image embedding is one vector:
how it becomes states is not in the supplement, and ours.

Legend: B batch, L text tokens, D their width.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def embedding_states(
    embeddings: Float[Array, "B D"], states: Float[Array, "B L D"]
) -> Float[Array, "B L D"]:
    """An embedding as the state of every token but BOS.

    BOS keeps its state, which is the same for every text. The embedding is scaled to
    the mean norm of the caption's other states: a text encoder's last layer norm gives
    states of one size, a projection gives embeddings of another.

    Args:
      embeddings: of images; a zero stays zero.
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
    """An editing direction, E(I1) - E(I2) (supplement, section 2), as states.

    Made of the difference as `embedding_states` makes them; of two equal images nothing
    is left but BOS.

    Args:
      embeddings: E(I1), of the sources.
      others: E(I2), of other images.
      states: of the sources' captions.
    """
    return embedding_states(embeddings - others, states)
