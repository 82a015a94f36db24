"""CLIP embeddings of images, each a function of its image alone."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import Float

from mvc_jax.checkpoints import clip_checkpoint, diffusers_layout
from mvc_jax.data import captions
from mvc_jax.models import clip
from mvc_jax.screening.settings import CLIP_FIELD, has_image_encoder


@dataclasses.dataclass(frozen=True)
class ClipEmbedder:
    """A CLIP on one device, independent of the mesh of the sampler."""

    model: clip.Clip
    params: clip.Params

    @functools.cached_property
    def _image_embeddings(self) -> Callable:
        return jax.jit(self.model.image_embeddings)

    def embed(self, images: Iterable[np.ndarray]) -> Float[np.ndarray, "N P"]:
        """Embeds uint8 images [H, W, 3] one at a time.

        The rounding of a matrix product depends on the batch, and embedding is cheap
        next to sampling.
        """
        pixels = (self.model.preprocess(np.asarray(image)[None]) for image in images)
        return np.concatenate(
            [np.asarray(self._image_embeddings(self.params, p)) for p in pixels]
        )

    def zero_shot(
        self, class_names: Sequence[str], class_type: str
    ) -> Callable[[Float[np.ndarray, "N P"]], Float[np.ndarray, "N K"]]:
        """Returns a zero-shot classifier: image embeddings -> class probabilities.

        The text of a class is `"a photo of {class_type} {class name}"`.
        """
        texts = captions.class_texts(class_names, class_type)
        encode, classify = jax.jit(self.model.text_embeddings), jax.jit(clip.zero_shot)
        states = encode(self.params, self.model.tokenize(texts))
        scale = self.params["logit_scale"]
        return lambda images: np.asarray(classify(np.float32(images), states, scale))


def load(workdir: epath.Path, clip_path: str, *, text: bool) -> ClipEmbedder | None:
    """Loads a CLIP onto the first device.

    Args:
      workdir: of a run whose base model `encode` has recorded.
      clip_path: folder or hub name; "": the image encoder of the base model.
      text: whether the text encoder is needed.

    Returns:
      the CLIP; None if `clip_path` is empty and the base has no image encoder.
    """
    path = clip_path
    if not path:
        path = diffusers_layout.resolved_base(workdir)
        if not has_image_encoder(path):
            return None
    model, params = clip_checkpoint.load(path, field=CLIP_FIELD, text=text)
    return ClipEmbedder(model, jax.device_put(params))
