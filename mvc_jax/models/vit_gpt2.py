"""Captions by a ViT encoder with a GPT-2 decoder, in JAX: transformers' Flax classes.

PyTorch is not needed, which makes this the captioner for TPU VMs.
`checkpoints/vit_gpt2_captioner.py` reads the checkpoint.

Legend: B batch, N images, S pixels along a side, H W pixels as the encoder takes them,
L tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from mvc_jax.errors import UserError
from mvc_jax.models.flax_classes import transformers

DTYPES = ("auto", "float32", "bfloat16")

Params = dict[str, Any]


class Network(transformers.FlaxVisionEncoderDecoderModel):
    """The library's model without random weights: each call is given parameters."""

    def init_weights(self, rng, input_shape, params=None) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        init = super().init_weights
        with jax.numpy_rank_promotion("allow"):  # the library's layers rely on it
            return jax.eval_shape(lambda key: init(key, input_shape), rng)

    def _adapt_logits_for_beam_search(self, logits: Array) -> Array:
        # Scores of beams are sums over tokens, too close together for bfloat16.
        return logits.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class VitGpt2:
    """A captioner without its parameters.

    Attributes:
      network: with the checkpoint's generation config.
      tokenizer: of the decoder.
      preprocess: uint8 images [B, S, S, 3] -> float32 [B, 3, H, W]; on the host.
    """

    network: Network
    tokenizer: Any
    preprocess: Callable[[np.ndarray], np.ndarray]

    @property
    def max_new_tokens(self) -> int:
        """The longest caption; one of the decoder's positions is the start token's."""
        return self.network.config.decoder.n_positions - 1

    def generate(
        self,
        params: Params,
        pixels: Float[Array, "B 3 H W"],
        *,
        max_new_tokens: int,
        num_beams: int,
    ) -> Int[Array, "B L"]:
        """Token ids: the start token, at most `max_new_tokens`, and padding."""
        settings = self.network.generation_config
        decoder = self.network.config.decoder
        end = settings.eos_token_id
        end = decoder.eos_token_id if end is None else end
        end = end[0] if isinstance(end, list) else end
        start = settings.decoder_start_token_id
        padding = settings.pad_token_id
        with jax.numpy_rank_promotion("allow"):
            return self.network.generate(
                pixels,
                params=params,
                do_sample=False,
                num_beams=num_beams,
                num_return_sequences=1,
                max_new_tokens=max_new_tokens,
                eos_token_id=end,
                pad_token_id=end if padding is None else padding,
                decoder_start_token_id=decoder.bos_token_id if start is None else start,
            ).sequences


def captions(
    model: VitGpt2,
    params: Params,
    images: UInt8[np.ndarray, "N S S 3"],
    rows: Sequence[int],
    *,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int,
) -> Iterator[tuple[int, str]]:
    """Captions some rows of an array of images, in the order of `rows`.

    Args:
      model: the captioner.
      params: its parameters.
      images: may be a memory map.
      rows: indices of images, 0 to N - 1.
      batch_size: images per batch; the last batch is padded.
      max_new_tokens: maximum number of tokens of a caption.
      num_beams: width of the beam search; 1 is greedy. Nothing is sampled.

    Yields:
      (row, caption as generated).

    Raises:
      UserError: the decoder has too few positions for `max_new_tokens`.
    """
    if max_new_tokens > model.max_new_tokens:
        raise UserError(
            "config.caption.max_new_tokens",
            wanted=f"at most {model.max_new_tokens}, by the positions of the decoder",
            got=f"{max_new_tokens}",
            fix="Lower it.",
        )
    generate = jax.jit(
        functools.partial(
            model.generate, max_new_tokens=max_new_tokens, num_beams=num_beams
        )
    )
    for start in range(0, len(rows), batch_size):
        batch = list(rows[start : start + batch_size])
        padded = batch + batch[-1:] * (batch_size - len(batch))
        pixels = model.preprocess(images[padded])
        tokens = np.asarray(generate(params, pixels))[: len(batch)]
        texts = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        yield from zip(batch, texts, strict=True)
