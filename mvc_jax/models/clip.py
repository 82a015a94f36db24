"""CLIP: images and texts to embeddings of one space (arXiv 2103.00020), in JAX.

Both layouts of a public checkpoint are read: a whole CLIPModel (as
openai/clip-vit-large-patch14), and the image tower alone, CLIPVisionModelWithProjection
(the `image_encoder` of a diffusers pipeline). Safetensors only, without PyTorch.

Legend: B batch, S pixels along a side as the tower takes them, L tokens, P dims of an
embedding.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from etils import epath
from jaxtyping import Array, Float, Int, UInt8
from transformers.modeling_flax_utils import ACT2FN
from transformers.models.clip.modeling_flax_clip import (
    FlaxCLIPTextModelWithProjectionModule,
    FlaxCLIPVisionTransformer,
)

from mvc_jax import files
from mvc_jax.checkpoints import diffusers_layout, hub, pipeline_folder, weights
from mvc_jax.errors import UserError, require

IMAGE_ENCODER = "image_encoder"  # of a diffusers pipeline, beside the next
PROCESSOR = "feature_extractor/preprocessor_config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_KINDS = ("clip", "clip_vision_model")
_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor")
_PATTERNS = ("*.json", "*.txt", "model*.safetensors")
_TEXT = r"^(text_model|text_projection|logit_scale)"
_WHOLE_NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
)

Params = dict[str, Any]


class _ImageTower(nn.Module):
    """CLIPVisionModelWithProjection, which transformers has no Flax class of."""

    config: transformers.CLIPVisionConfig

    def setup(self):
        self.vision_model = FlaxCLIPVisionTransformer(self.config)
        self.visual_projection = nn.Dense(self.config.projection_dim, use_bias=False)

    def __call__(self, pixels):
        return self.visual_projection(self.vision_model(pixels).pooler_output)


@dataclasses.dataclass(frozen=True)
class Clip:
    """The architecture: config.json's content, the preprocessing, the tokenizer.

    Parameters are passed to each method: `vision_model` and `visual_projection`, and
    where there is a text tower `text_model`, `text_projection` and `logit_scale`.

    Attributes:
      vision: of the image tower.
      processor: resizes, crops and normalises, as preprocessor_config.json says.
      text: of the text tower, if it was asked for.
      tokenizer: of the text tower.
    """

    vision: transformers.CLIPVisionConfig
    processor: transformers.CLIPImageProcessor
    text: transformers.CLIPTextConfig | None = None
    tokenizer: transformers.CLIPTokenizerFast | None = None

    @functools.cached_property
    def image_tower(self) -> nn.Module:
        return _ImageTower(self.vision)

    @functools.cached_property
    def text_tower(self) -> nn.Module:
        return FlaxCLIPTextModelWithProjectionModule(self.text)

    @property
    def width(self) -> int:
        """P: dims of an embedding."""
        return self.vision.projection_dim

    def preprocess(
        self, images: UInt8[np.ndarray, "B H W 3"]
    ) -> Float[np.ndarray, "B S S 3"]:
        """Images as the tower takes them; on the host, by Pillow."""
        pixels = self.processor(
            list(images), input_data_format="channels_last", return_tensors="np"
        )["pixel_values"]
        return pixels.transpose(0, 2, 3, 1).astype(np.float32)

    def image_embeddings(
        self, params: Params, pixels: Float[Array, "B S S 3"]
    ) -> Float[Array, "B P"]:
        """Projected, not normalised embeddings of `preprocess`ed images."""
        params = {name: params[name] for name in ("vision_model", "visual_projection")}
        return self.image_tower.apply({"params": params}, pixels)

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        """Token ids with BOS, EOS and padding; longer texts are cut."""
        return self.tokenizer(
            list(texts),
            max_length=self.text.max_position_embeddings,
            padding="max_length",
            truncation=True,
            return_tensors="np",
        )["input_ids"].astype(np.int32)

    def text_embeddings(
        self, params: Params, ids: Int[Array, "B L"]
    ) -> Float[Array, "B P"]:
        """Projected, not normalised embeddings of the texts' EOS tokens."""
        params = {name: params[name] for name in ("text_model", "text_projection")}
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        output = self.text_tower.apply(
            {"params": params}, ids, jnp.ones_like(ids), positions
        )
        return output.text_embeds

    def shapes(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""

        def init(key):
            side = self.vision.image_size
            pixels = jnp.zeros((1, side, side, 3))
            params = dict(self.image_tower.init(key, pixels)["params"])
            if self.text is not None:
                ids = jnp.zeros((1, self.text.max_position_embeddings), jnp.int32)
                params |= self.text_tower.init(key, ids, ids, ids)["params"]
                params["logit_scale"] = jnp.zeros(())
            return params

        return jax.eval_shape(init, jax.random.key(0))


def normalised(embeddings: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """Embeddings of length 1: their dot products are CLIP's cosine similarities.

    A zero, which stands for no example, stays zero, with a gradient.
    """
    square = (embeddings**2).sum(axis=-1, keepdims=True)
    return embeddings * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def zero_shot(
    images: Float[Array, "B P"], texts: Float[Array, "K P"], logit_scale: Array
) -> Float[Array, "B K"]:
    """The probability of each text for each image (arXiv 2103.00020, figure 3).

    Args:
      images: their embeddings.
      texts: the embeddings of one text a class.
      logit_scale: the checkpoint's, a logarithm.
    """
    logits = jnp.exp(logit_scale) * normalised(images) @ normalised(texts).T
    return jax.nn.softmax(logits)


def small_tower(
    *, side: int, patch: int, width: int, layers: int, heads: int, embedding: int
) -> Clip:
    """An image tower of any size, without weights.

    Args:
      side: S, pixels.
      patch: pixels along a side of a patch.
      width: dims of its states.
      layers: of its transformer.
      heads: of its attention.
      embedding: P.
    """
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=embedding,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
    )
    return Clip(config, image_processor(side))


def load(
    path: epath.PathLike, *, field: str, text: bool = False
) -> tuple[Clip, Params]:
    """Reads a CLIP checkpoint.

    Args:
      path: a folder, of a CLIPModel, an image tower or a pipeline with one, or a name
        on the Hugging Face hub.
      field: the setting that holds it, for errors.
      text: whether the text tower is needed, too.

    Returns:
      the architecture, and host parameters in the precision in which they are stored.

    Raises:
      UserError: a file is missing or damaged, it is another model, or tensors are
        missing, unexpected or of another shape.
    """
    folder = _find(path, field)
    model = _read_architecture(folder, field, text)
    file = next(folder / name for name in _WEIGHTS if (folder / name).exists())
    weights.check(file)
    return model, weights.read(file, model.shapes(), unused=r"(?!)" if text else _TEXT)


def check(path: epath.PathLike, *, field: str, text: bool = False) -> Clip | None:
    """Refuses, without reading a tensor, what `load` would refuse.

    Returns:
      the architecture; None for a hub name, of which the hub is asked no more than
      whether it has it.
    """
    if not hub.is_local(str(path)):
        hub.check_name(str(path), field=f"{field} {str(path)!r}")
        return None
    folder = _find(path, field)
    for name in _WEIGHTS:
        if (folder / name).exists():
            weights.check(folder / name)
            break
    return _read_architecture(folder, field, text)


def save(folder: epath.PathLike, model: Clip, params: Params) -> list[str]:
    """Writes the image tower into the folder of a diffusers pipeline.

    `INDEX_ENTRIES` belong into its model_index.json.

    Returns:
      the files written, relative to `folder`.
    """
    folder = epath.Path(folder)
    written = [f"{IMAGE_ENCODER}/config.json", f"{IMAGE_ENCODER}/{_WEIGHTS[0]}"]
    config = model.vision.to_diff_dict()
    config["architectures"] = ["CLIPVisionModelWithProjection"]
    files.write_json(folder / written[0], config)
    tower = {name: params[name] for name in ("vision_model", "visual_projection")}
    weights.write(folder / written[1], tower)
    files.write_json(folder / PROCESSOR, model.processor.to_dict())
    return [*written, PROCESSOR]


INDEX_ENTRIES = {
    IMAGE_ENCODER: ["transformers", "CLIPVisionModelWithProjection"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}


def _find(path: epath.PathLike, field: str) -> epath.Path:
    """The folder that holds config.json and weights, its files looked over."""
    name = str(path)
    field = f"{field} {name!r}"
    folder = hub.locate(name, _PATTERNS, field=field)
    if (folder / pipeline_folder.INDEX).exists():  # a pipeline
        folder = folder / IMAGE_ENCODER
    require(
        (folder / "config.json").exists(),
        field,
        wanted="a folder with a CLIP model and its config.json",
        got=f"none at {folder}" if folder.is_dir() else f"no folder {folder}",
        fix="Name openai/clip-vit-large-patch14, or the folder of such a checkpoint.",
    )
    pickles = sorted(
        file.name
        for end in ("bin", "pt", "msgpack")
        for file in folder.glob(f"*.{end}")
    )
    require(
        any((folder / file).exists() for file in _WEIGHTS),
        field,
        wanted=f"weights in {folder / _WEIGHTS[0]}",
        got=", ".join(pickles) or "none",
        fix="Pickles are never opened. If you trust it, convert it once, with PyTorch: "
        f"python -c \"from transformers import CLIPModel as M; M.from_pretrained('"
        f"{folder}').save_pretrained('{folder}')\"."
        if pickles
        else "Download the checkpoint again, whole.",
    )
    return folder


def _read_architecture(folder: epath.Path, field: str, text: bool) -> Clip:
    config = pipeline_folder.read_json(folder / "config.json")
    field = f"{field} {str(folder)!r}"
    kind = config.get("model_type")
    require(
        kind in _KINDS,
        field,
        wanted=f"model_type {' or '.join(map(repr, _KINDS))} in its config.json",
        got=repr(kind),
        fix="Name a CLIP with an image tower, as openai/clip-vit-large-patch14.",
    )
    require(
        not text or kind == "clip",
        field,
        wanted="a CLIP with a text tower, to compare images with texts",
        got="an image tower alone",
        fix="Name a whole CLIPModel, as openai/clip-vit-large-patch14.",
    )
    words = None
    if kind == "clip":
        whole = transformers.CLIPConfig.from_dict(config)
        vision, words = whole.vision_config, whole.text_config
        vision.projection_dim = words.projection_dim = whole.projection_dim
    else:
        vision = transformers.CLIPVisionConfig.from_dict(config)
    for part in (vision, words) if text else (vision,):
        _check_config(part, str(folder / "config.json"))
    tokenizer = diffusers_layout.read_tokenizer(folder) if text else None
    processor = _read_processor(folder, vision.image_size)
    return Clip(vision, processor, words if text else None, tokenizer)


def _check_config(config: Any, path: str) -> None:
    """Requires numbers that make a network, and an activation that Flax knows."""
    numbers = [*_WHOLE_NUMBERS]
    if isinstance(config, transformers.CLIPVisionConfig):
        numbers += ["image_size", "patch_size"]
    problems = [
        f"{name} is {value!r}, not a whole number above 0"
        for name in numbers
        if type(value := getattr(config, name)) is not int or value < 1
    ]
    if config.hidden_act not in ACT2FN:
        problems.append(f"hidden_act is {config.hidden_act!r}")
    if not problems and config.hidden_size % config.num_attention_heads:
        problems.append(
            f"{config.num_attention_heads} heads do not divide {config.hidden_size}"
        )
    if not problems and getattr(config, "num_channels", 3) != 3:
        problems.append(f"num_channels is {config.num_channels}, not 3")
    require(
        not problems,
        path,
        wanted="the options of CLIP",
        got="; ".join(problems),
        fix="Take config.json from the checkpoint, unchanged.",
    )


def _read_processor(folder: epath.Path, side: int) -> transformers.CLIPImageProcessor:
    """What brings images to `side` pixels; CLIP's own where no file says it."""
    candidates = (folder / "preprocessor_config.json", folder.parent / PROCESSOR)
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        return image_processor(side)
    config = pipeline_folder.read_json(path)
    kinds = ("image_processor_type", "feature_extractor_type")
    kind = next((config[name] for name in kinds if name in config), _PROCESSORS[0])
    try:
        processor = transformers.CLIPImageProcessor.from_dict(config)
        black = np.zeros((8, 12, 3), np.uint8)
        made = processor(black, input_data_format="channels_last")["pixel_values"]
        shape = np.shape(made[0])
    except (
        Exception
    ) as error:  # of the library, Pillow or NumPy, as the numbers have it
        raise UserError(
            str(path),
            wanted="the options of CLIP's image processor",
            got=f"some that do not work ({type(error).__name__}: {error})",
            fix="Take it from the checkpoint, unchanged.",
        ) from error
    require(
        kind in _PROCESSORS and shape == (3, side, side),
        str(path),
        wanted=f"a {_PROCESSORS[0]} that makes images of {side} pixels, the "
        "image_size of config.json",
        got=f"a {kind} that makes {' x '.join(map(str, shape[1:]))}",
        fix="Take preprocessor_config.json and config.json from one checkpoint.",
    )
    return processor


def image_processor(side: int) -> transformers.CLIPImageProcessor:
    """CLIP's: shorter side to `side` pixels, centre crop, CLIP's mean and spread."""
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
