"""A fine-tuned Stable Diffusion that draws images from real ones and mixed texts.

    from mvc_jax.pipeline import InstructPix2Pix

    pipeline = InstructPix2Pix.from_pretrained("runs/parts/finetune/model")
    images = pipeline.sample(images, prompts, key=jax.random.key(0))

It is made of what `generate` draws with: at the same settings, and with the key of an
image's recipe, it draws that image.

Legend: B batch, H W image, h w latent grid, c its channels, L tokens, D their width.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8

from mvc_jax.checkpoints import diffusers_layout
from mvc_jax.diffusion import instruct_pix2pix, timesteps
from mvc_jax.errors import UserError
from mvc_jax.generation import image_sampler
from mvc_jax.generation.image_status import STATUSES
from mvc_jax.mixing import operations
from mvc_jax.models.stable_diffusion import Params, StableDiffusion
from mvc_jax.training import sharding

__all__ = ["InstructPix2Pix"]

Recipe = Mapping[str, Any]


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
          folder: what `finetune` wrote to `finetune/model`, a base model's folder, or
            its name on the Hugging Face hub.
          variant: of the files of the weights, as `fp16`.
          revision: of a name on the hub.
          **options: of `InstructPix2Pix`.

        Raises:
          UserError: a file is missing, damaged or of another family.
        """
        model, params = diffusers_layout.load(
            folder, variant=variant, revision=revision
        )
        return cls(model, params, **options)

    def sample(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        *,
        key: Key[Array, ""],
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

        Args:
          images: the sources, uint8 [B, H, W, 3] with pixels in [0, 255]; H and W are
            multiples of `model.downsampling`.
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
          time_ids: of Stable Diffusion XL, int [B, 6]: what it is told about the size
            of each image (`data/time_ids.py`); None: that it is `images` as they are.

        Returns:
          pixels in [0, 255]. A warning names images that are not finite, or of one
          colour.

        Raises:
          UserError: the sizes of the arguments do not match, or a recipe is not valid.
        """
        self._check(images, prompts, partners, recipe)
        timesteps.require_noise(sampler, steps, timestep_spacing)
        settings = image_sampler.Settings(
            sampler=sampler,
            steps=steps,
            spacing=timestep_spacing,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            grey=grey,
            **self._options,
        )
        count = len(images)
        recipes = _for_each(recipe, count)
        given = {
            "noise_seed": np.arange(count),
            "text_scale": np.broadcast_to(text_scale, [count]),
            "image_scale": np.broadcast_to(image_scale, [count]),
        }
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
        self, images: UInt8[np.ndarray, "B H W 3"]
    ) -> Float[np.ndarray, "B h w c2"]:
        """Mean and log variance of the posterior of images with pixels in [0, 255]."""
        return self._in_batches(
            lambda rows: self._encode_images(self._params, rows), np.asarray(images)
        )

    def encode_texts(
        self,
        prompts: Sequence[str],
        partners: Sequence[str] | Sequence[Sequence[str]] | None = None,
        recipe: Recipe | Sequence[Recipe] | None = None,
    ) -> Float[np.ndarray, "B L D"] | dict[str, np.ndarray]:
        """The text states of prompts, mixed with their partners' as `sample` says.

        Of Stable Diffusion XL these are `states`, beside `pooled` [B, P].
        """
        count, length = len(prompts), self.model.context_length
        several = [[x] if isinstance(x, str) else [*x] for x in partners or ()]
        texts = [*prompts, *(text for each in several for text in each)]
        found = self._in_batches(
            lambda rows: self._encode_texts(self._params, rows),
            self.model.tokenize(texts),
        )
        if recipe is None or partners is None:
            return jax.tree.map(lambda array: array[:count], found)
        numbers = map(str, range(count, len(texts)))
        recipes = [
            completed(own, length)
            | {"source": str(i), "partners": [next(numbers) for _ in theirs]}
            for i, (own, theirs) in enumerate(
                zip(_for_each(recipe, count), several, strict=True)
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
                zip(_for_each(recipe, count), recipes, strict=True)
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

    def _check(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        partners: Sequence | None,
        recipe: Recipe | Sequence[Recipe] | None,
    ) -> None:
        """Raises a `UserError` for arguments of `sample` that do not match."""
        shape, step = np.shape(images), self.model.downsampling
        fits = len(shape) == 4 and shape[3] == 3 and images.dtype == np.uint8
        if not fits or shape[1] % step or shape[2] % step:
            raise UserError(
                "images",
                wanted=f"uint8 [B, H, W, 3], with H and W multiples of {step}",
                got=f"{getattr(images, 'dtype', type(images).__name__)} {[*shape]}",
                fix="Resize them; pixels in [0, 1] become uint8 by "
                "(255 * x).round().astype('uint8').",
            )
        counts = {"prompts": prompts, "partners": partners}
        if recipe is not None and not isinstance(recipe, Mapping):
            counts["recipe"] = recipe
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
        mixes = [r for r in _for_each(recipe, 1) if r.get("positions") or r.get("dims")]
        if partners is None and mixes:
            raise UserError(
                "recipe",
                wanted="partners, of which it mixes the texts",
                got="none",
                fix="Pass partners=, a text for each image.",
            )


def completed(recipe: Recipe, length: int) -> dict[str, Any]:
    """A recipe with every field that `mixing.operations.as_arrays` reads.

    Args:
      recipe: as `InstructPix2Pix.sample` takes it.
      length: L, tokens of a text state.
    """
    positions, dims = [*recipe.get("positions", ())], [*recipe.get("dims", ())]
    if dims and not isinstance(dims[0], Sequence):
        dims = [dims]  # the same for all tokens
    columns = len(dims[0]) if dims else 0
    return {
        "positions": positions,
        "donors": recipe.get("donors", [0] * len(positions)),
        "dims": dims,
        "dim_donors": recipe.get("dim_donors", [0] * columns),
        "dim_tokens": recipe.get("dim_tokens", [1, length]),
    }


def _for_each(recipe: Recipe | Sequence[Recipe] | None, count: int) -> list[Recipe]:
    if recipe is None or isinstance(recipe, Mapping):
        return [recipe or {}] * count
    return [*recipe]


_mix = jax.jit(jax.vmap(operations.mix))
