"""A fine-tuned Stable Diffusion that draws images from real ones and mixed texts.

    from mvc_jax.pipeline import InstructPix2Pix

    pipeline = InstructPix2Pix.from_pretrained("runs/parts/finetune/model")
    images = pipeline.sample(images, prompts, key=jax.random.key(0))

It is made of what `generate` draws with: at the same settings, and with the key of an
image's recipe, it draws that image.

Legend: B batch, H W image, h w latent grid, c its channels, L tokens, D their width.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, UInt8, UInt32

from mvc_jax.checkpoints import diffusers_layout
from mvc_jax.configs import common
from mvc_jax.diffusion import instruct_pix2pix, timesteps
from mvc_jax.errors import UserError
from mvc_jax.generation import image_sampler
from mvc_jax.generation.image_status import STATUSES
from mvc_jax.mixing import given_recipes, operations
from mvc_jax.mixing.given_recipes import Recipe
from mvc_jax.models.stable_diffusion import Params, StableDiffusion
from mvc_jax.training import sharding

__all__ = ["InstructPix2Pix"]

_ARGUMENTS = {"config.base.path": "folder", "config.base.": "", "config.generate.": ""}


class InstructPix2Pix:
    """A model on the devices, and the programs that are compiled for it.

    Args:
      model: the architecture, with a tokenizer.
      params: host parameters with the keys `model.components`. A UNet that is not
        conditioned on images is widened, and ignores them.
      mesh: devices that share a batch; None: all of this process.
      dtype: of the UNet's activations, `float32` or `bfloat16`; `auto` is bfloat16 on
        an accelerator.
      attention: implementation of attention, as `config.generate.attention`.
      batch_size: images that are drawn at once; a call's last batch is padded. It
        changes no image.
    """

    def __init__(
        self,
        model: StableDiffusion,
        params: Params,
        *,
        mesh: Mesh | None = None,
        dtype: str = "auto",
        attention: str = "auto",
        batch_size: int = 16,
    ):
        _check_fields(
            {"dtype": dtype, "attention": attention, "batch_size": batch_size}
        )
        self.mesh = mesh or sharding.make_mesh(devices=jax.local_devices())
        self.model, params = model.widened(params)
        self._params = jax.device_put(
            params, sharding.tree_shardings(params, self.mesh)
        )
        self._size = sharding.padded_size(batch_size, self.mesh)
        self._options = {"dtype": dtype, "attention": attention}
        self._encode_images = jax.jit(self.model.encode_pixels)
        self._encode_texts = jax.jit(self.model.conditions)
        self._draw = functools.lru_cache(self._compiled)

    @classmethod
    def from_pretrained(
        cls,
        folder: epath.PathLike,
        *,
        variant: str = "",
        revision: str = "",
        **options: Any,
    ) -> "InstructPix2Pix":
        """Reads a model in the diffusers layout; safetensors only, without PyTorch.

        >>> pipeline = InstructPix2Pix.from_pretrained(folder)
        >>> import jax, numpy as np
        >>> side = 4 * pipeline.model.downsampling
        >>> real = np.full((2, side, side, 3), 128, np.uint8)
        >>> prompts = ["a photo of a cat", "a photo of a dog"]
        >>> images = pipeline.sample(real, prompts, key=jax.random.key(0), steps=2)
        >>> images.shape == real.shape, images.dtype
        (True, dtype('uint8'))
        >>> mixed = pipeline.sample(
        ...     real,
        ...     prompts,
        ...     partners=["an old cat", "an old dog"],
        ...     recipe={"positions": [4, 5], "dims": [0, 3]},
        ...     key=jax.random.key(0),
        ...     steps=2,
        ... )
        >>> (mixed != images).any((1, 2, 3)).tolist()
        [True, True]

        Args:
          folder: what `finetune` wrote to `finetune/model`, or the workdir of that run;
            a base model's folder, or its name on the Hugging Face hub.
          variant: of the files of the weights, as `fp16`.
          revision: of a name on the hub.
          **options: of `InstructPix2Pix`.

        Raises:
          UserError: a file is missing, damaged or of another family.
        """
        with _naming_arguments():
            model, params = diffusers_layout.load(
                _folder_of(folder), variant=variant, revision=revision
            )
        return cls(model, params, **options)

    def sample(
        self,
        images: UInt8[ArrayLike, "B H W 3"] | Sequence[Any],
        prompts: Sequence[str],
        *,
        key: Key[Array, ""] | UInt32[Array, "2"],
        partners: Sequence[str] | Sequence[Sequence[str]] | None = None,
        recipe: Recipe | Sequence[Recipe] | None = None,
        text_scale: float | Sequence[float] = 7.5,
        image_scale: float | Sequence[float] = 1.5,
        sampler: str = "ddim",
        steps: int = 50,
        timestep_spacing: str = timesteps.AUTO,
        guidance_interval: tuple[float, float] = instruct_pix2pix.ALWAYS,
        guidance_rescale: float = 0.0,
        grey: bool = False,
        time_ids: np.ndarray | None = None,
    ) -> UInt8[np.ndarray, "B H W 3"]:
        """Draws an image for each real one and its prompt; see `from_pretrained`.

        A program is compiled for each size and combination of the settings from
        `sampler` on.

        Args:
          images: the sources, uint8 [B, H, W, 3] with pixels in [0, 255], or a list of
            B arrays or PIL images in RGB; H and W are multiples of
            `model.downsampling`.
          prompts: their texts.
          key: of the noise, of which image i has that of `fold_in(key, i)`.
          partners: texts that are mixed into the prompts: one or several for each.
          recipe: what is mixed, for all images or for each; None: nothing. Fields, all
            optional, as of a row of `recipes.jsonl`: `positions`, tokens that are
            replaced (the first is 1); `dims`, dims that are, of the tokens in
            `dim_tokens` = [start, stop), by default all but the first; `donors` and
            `dim_donors`, which partner each is of, by default the first. `noise_seed`,
            `text_scale` and `image_scale` in it replace i and the arguments.
          text_scale: s_T of InstructPix2Pix (arXiv 2211.09800), for all or for each.
          image_scale: s_I.
          sampler: `ddim`, `euler` or `dpmpp_2m`.
          steps: of the sampler.
          timestep_spacing: of the steps, as `config.generate.timestep_spacing`.
          guidance_interval: fractions of the training timesteps between which guidance
            is applied (arXiv 2404.07724).
          guidance_rescale: phi of the guided prediction, in [0, 1] (arXiv 2305.08891).
          grey: whether colour channels are averaged, as runs on images without colour
            do.
          time_ids: of Stable Diffusion XL, int [B, 6]: what it is given about the size
            of each image (`data/time_ids.py`); None: that it is `images` as they are.

        Returns:
          pixels in [0, 255]. A warning names images that are not finite, or of one
          colour.

        Raises:
          UserError: the sizes of the arguments do not match, or a recipe is not valid.
        """
        images, key = self._pixels(images), _key(key)
        scales = {"text_scale": text_scale, "image_scale": image_scale}
        self._check(images, prompts, partners, recipe, scales)
        _check_fields(
            {
                "sampler": sampler,
                "steps": steps,
                "timestep_spacing": timestep_spacing,
                "guidance_interval": guidance_interval,
                "guidance_rescale": guidance_rescale,
            }
        )
        with _naming_arguments():
            timesteps.require_noise(sampler, steps, timestep_spacing)
        settings = image_sampler.Settings(
            sampler=sampler,
            steps=steps,
            spacing=timestep_spacing,
            guidance_interval=tuple(guidance_interval),
            guidance_rescale=guidance_rescale,
            grey=grey,
            **self._options,
        )
        count = len(images)
        recipes = given_recipes.for_each(recipe, count)
        given = {name: np.broadcast_to(x, [count]) for name, x in scales.items()}
        given["noise_seed"] = np.arange(count)
        texts = self.encode_texts(prompts, partners, recipe)
        if self.model.pooled_width:
            texts["time_ids"] = self._time_ids(images, time_ids)
        batch = {
            "moments": self.encode_images(images),
            "states": texts,
            "redraws": np.zeros(count, np.int32),
        }
        for name, dtype in image_sampler.SCALARS.items():
            values = [r.get(name, v) for r, v in zip(recipes, given[name], strict=True)]
            batch[name] = np.asarray(values, dtype)
        null = jax.tree.map(lambda array: array[0], self.encode_texts([""]))
        draw = self._draw(settings)
        pixels, status = self._in_batches(
            lambda rows: draw(self._params, rows, null, key), batch
        )
        unusable = [f"image {i} is {STATUSES[s]}" for i, s in enumerate(status) if s]
        if unusable:
            logging.warning("InstructPix2Pix.sample: %s", "; ".join(unusable))
        return pixels

    def encode_images(
        self, images: UInt8[ArrayLike, "B H W 3"] | Sequence[Any]
    ) -> Float[np.ndarray, "B h w c2"]:
        """The posteriors of images in the latent space.

        Args:
          images: as `sample` takes them.

        Returns:
          mean and log variance on the last axis: c2 is 2 c.

        Raises:
          UserError: the images are of another kind.
        """
        return self._in_batches(
            lambda rows: self._encode_images(self._params, rows), self._pixels(images)
        )

    def encode_texts(
        self,
        prompts: Sequence[str],
        partners: Sequence[str] | Sequence[Sequence[str]] | None = None,
        recipe: Recipe | Sequence[Recipe] | None = None,
    ) -> Float[np.ndarray, "B L D"] | dict[str, np.ndarray]:
        """The text states of prompts, mixed with those of their partners.

        Of Stable Diffusion XL these are `states`, beside `pooled` [B, P].

        Args:
          prompts: B texts.
          partners: as `sample` takes them; None: nothing is mixed.
          recipe: as `sample` takes it.
        """
        count, length = len(prompts), self.model.context_length
        several = _lists_of(partners)
        texts = [*prompts, *(text for each in several for text in each)]
        found = self._in_batches(
            lambda rows: self._encode_texts(self._params, rows),
            self.model.tokenize(texts),
        )
        if recipe is None or partners is None:
            return jax.tree.map(lambda array: array[:count], found)
        numbers = map(str, range(count, len(texts)))
        recipes = [
            given_recipes.completed(own, length)
            | {"source": str(i), "partners": [next(numbers) for _ in theirs]}
            for i, (own, theirs) in enumerate(
                zip(given_recipes.for_each(recipe, count), several, strict=True)
            )
        ]
        arrays = operations.as_arrays(
            recipes,
            {str(i): i for i in range(len(texts))},
            length=length,
            width=self.model.text_width,
            widths=operations.widths_of(recipes),
        )
        states = found["states"] if self.model.pooled_width else found
        mixed = _mix(
            states[arrays["source"]],
            states[arrays["partners"]],
            *(arrays[x] for x in ("positions", "donors", "dims", "dim_donors")),
        )
        if not self.model.pooled_width:
            return np.asarray(mixed)
        pooled = [
            operations.mix_pooled(
                found["pooled"][i],
                found["pooled"][[int(number) for number in made["partners"]]],
                own.get("pooled"),
            )
            for i, (own, made) in enumerate(
                zip(given_recipes.for_each(recipe, count), recipes, strict=True)
            )
        ]
        return {"states": np.asarray(mixed), "pooled": np.stack(pooled)}

    def _time_ids(
        self, images: np.ndarray, given: np.ndarray | None
    ) -> Float[np.ndarray, "B 6"]:
        """Those given, or those of images that were neither resized nor cropped."""
        count, height, width, _ = images.shape
        own = np.asarray([[height, width, 0, 0, height, width]] * count)
        if given is not None and np.shape(given) != own.shape:
            raise UserError(
                "time_ids",
                wanted=f"six numbers for each of the {count} images",
                got=f"an array {[*np.shape(given)]}",
                fix="data/time_ids.py says which; None takes the images as they are.",
            )
        return np.asarray(own if given is None else given, np.float32)

    def _compiled(self, settings: image_sampler.Settings) -> Callable:
        return image_sampler.jit_sample_images(self.model, None, settings, self.mesh)

    def _in_batches(self, function: Callable[[Any], Any], rows: Any) -> Any:
        """`function` of arrays whose first axis is that of the images, on the host."""
        count = len(jax.tree.leaves(rows)[0])
        size = min(self._size, sharding.padded_size(count, self.mesh))
        spread = sharding.batch_sharding(self.mesh)
        found = []
        for start in range(0, count, size):
            part = jax.tree.map(lambda x, i=start: x[i : i + size], rows)
            padded = jax.tree.map(lambda x: sharding.pad_rows(x, size), part)
            found.append(function(jax.device_put(padded, spread)))
        return jax.tree.map(lambda *x: np.concatenate(x)[:count], *found)

    def _pixels(self, images: Any) -> np.ndarray:
        """Images as one array; raises a `UserError` for others than `sample` takes."""
        step = self.model.downsampling
        try:
            pixels = np.asarray(images)
        except ValueError:  # of a list
            pixels = np.zeros(0)
            shapes = sorted({np.shape(image) for image in images})
            got = f"a list of sizes {', '.join(map(str, shapes))}"
        else:
            got = f"{pixels.dtype} {[*pixels.shape]}"
        shape = pixels.shape
        fits = len(shape) == 4 and shape[3] == 3 and pixels.dtype == np.uint8
        if not fits or shape[1] % step or shape[2] % step or 0 in shape:
            raise UserError(
                "images",
                wanted="one or more, uint8 [B, H, W, 3], with H and W multiples of "
                f"{step}",
                got=got,
                fix="Resize them; images[None] is a batch of one; pixels in [0, 1] "
                "become uint8 by (255 * x).round().astype('uint8').",
            )
        return pixels

    def _check(
        self,
        images: np.ndarray,
        prompts: Sequence,
        partners: Sequence | None,
        recipe: Any,
        scales: Mapping[str, Any],
    ) -> None:
        """Raises a `UserError` for arguments of `sample` that do not match."""
        counts = {"prompts": prompts, "partners": partners}
        if recipe is not None and not isinstance(recipe, Mapping):
            counts["recipe"] = recipe
        counts |= {name: x for name, x in scales.items() if np.ndim(x)}
        for name, values in counts.items():
            if isinstance(values, str) or (
                values is not None and len(values) != len(images)
            ):
                text = isinstance(values, str)
                raise UserError(
                    name,
                    wanted=f"one for each of the {len(images)} images",
                    got="a string" if text else f"{len(values)}",
                    fix="Pass a list of as many.",
                )
        for name, values in (("prompts", prompts), ("partners", partners or ())):
            each = [x for x in values if not isinstance(x, str)]
            if name == "partners":
                each = [x for x in each if not isinstance(x, Sequence) or not x]
            if each:
                raise UserError(
                    name,
                    wanted="a text for each image",
                    got=f"{each[0]!r} among them",
                    fix="Pass a list of strings; partners may be a list of several for "
                    "each image.",
                )
        for name, values in scales.items():
            for value in np.ravel(values).tolist():
                _check_fields({name: value})
        given_recipes.require_valid(
            recipe,
            None if partners is None else [*map(len, _lists_of(partners))],
            count=len(images),
            length=self.model.context_length,
            width=self.model.text_width,
        )


def _key(key: Any) -> Key[Array, ""]:
    """A key of the new or of the old style.

    Raises:
      UserError: it is none.
    """
    key = jnp.asarray(key)
    if key.dtype == jnp.uint32 and key.shape == (2,):  # of jax.random.PRNGKey
        key = jax.random.wrap_key_data(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim:
        raise UserError(
            "key",
            wanted="one random key",
            got=f"{key.dtype} {[*key.shape]}",
            fix="Pass e.g. jax.random.key(0).",
        )
    return key


def _check_fields(values: Mapping[str, Any]) -> None:
    """Checks arguments that are fields of `config.generate`, by their declarations."""
    section = common.FIELDS.find("generate")
    for name, value in values.items():
        field = section.fields[name]
        field.require(name, tuple(value) if np.ndim(value) else value)


@contextlib.contextmanager
def _naming_arguments() -> Iterator[None]:
    """Names the argument in place of the field of a config in a `UserError`."""
    try:
        yield
    except UserError as error:
        fields = error.fields()
        for field, argument in _ARGUMENTS.items():
            fields = {
                name: text.replace(field, argument) if isinstance(text, str) else text
                for name, text in fields.items()
            }
        raise UserError(**fields) from error


def _folder_of(folder: epath.PathLike) -> epath.PathLike:
    """The model's folder, where a workdir of a run is named."""
    model = epath.Path(folder) / "finetune" / "model"
    return model if (model / "model_index.json").exists() else folder


def _lists_of(texts: Sequence[str] | Sequence[Sequence[str]] | None) -> list[list[str]]:
    return [[x] if isinstance(x, str) else [*x] for x in texts or ()]


_mix = jax.jit(jax.vmap(operations.mix))
