"""UNet, recipes -> the augmented dataset.

Reads: the fine-tuned model, `mix/recipes.jsonl`, `encode/`. Writes a dataset for each
set of `generate.sets`, all from the same recipes and noise: `mixed`, the method;
`unmixed`, its control, the source's own caption; `pretrained`, the control that leaves
out fine-tuning, the base model by caption alone.
"""

import functools

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from mvc_jax import files, mix
from mvc_jax.data import manifest, splits, synthetic
from mvc_jax.data.cache import open_cache
from mvc_jax.data.recipe_file import read_recipes
from mvc_jax.data.recipes import NOTHING
from mvc_jax.diffusion import instruct_pix2pix
from mvc_jax.errors import require
from mvc_jax.models import checkpoint_folder, diffusers_layout, stable_diffusion
from mvc_jax.training import rng, sharding
from mvc_jax.training.console import Progress

SETS = ("mixed", "unmixed", "pretrained")


def check(config: ConfigDict) -> None:
    """Checks the section `generate`."""
    section = config.generate
    require(
        0 < len(section.sets) == len(set(section.sets) & set(SETS)),
        "config.generate.sets",
        wanted=f"some of {', '.join(SETS)}, each once",
        got=tuple(section.sets),
        fix="Name these.",
    )
    for field in ("batch_size", "shard_size", "steps"):
        require(
            section[field] > 0,
            f"config.generate.{field}",
            wanted="at least 1",
            got=section[field],
            fix="Raise it.",
        )
    require(
        section.steps < 1000,
        "config.generate.steps",
        wanted="fewer than 1000, the timesteps of training",
        got=section.steps,
        fix="Lower it; 50 is usual.",
    )
    for field in ("text_scale", "image_scale"):
        require(
            0 <= section[field] < float("inf"),
            f"config.generate.{field}",
            wanted="a number of at least 0",
            got=section[field],
            fix="InstructPix2Pix uses 7.5 for text and 1.5 for the image.",
        )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Samples every set, shard by shard; shards that exist are kept."""
    workdir = epath.Path(workdir)
    section = config.generate.to_dict()
    batch_size = section.pop("batch_size")  # changes no image
    settings = {"seed": config.seed, "data": config.data.to_dict()}
    settings |= {"base": config.base.to_dict(), "generate": section}
    stage = manifest.open_stage(
        workdir, "generate", settings, inputs=("finetune", "mix")
    )
    if stage.complete:
        return
    prompts = files.read_jsonl(workdir / "encode" / "prompts.jsonl")
    rows = {row["id"]: row for row in prompts}
    recipes = read_recipes(workdir / "mix" / "recipes.jsonl", any_partner=True)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sampler = Sampler(config, workdir, mesh, batch_size, mix.widths_of(recipes))
    artifacts, constant = [], 0
    for name in section["sets"]:
        folder = stage.folder / name
        params, model_hash = sampler.load(name)
        chosen = [recipe_of_set(recipe, name) for recipe in recipes]
        provenance = [_provenance(r, rows, config, model_hash) for r in chosen]
        size = section["shard_size"]
        starts = range(0, len(chosen), size)
        progress = Progress(f"generate/{name}", len(chosen), unit="image")
        for shard, start in enumerate(starts):
            path = synthetic.shard_path(folder, shard, len(starts))
            part = slice(start, start + size)
            if not path.exists():
                images = sampler.images(params, chosen[part])
                synthetic.write_shard(
                    path,
                    images,
                    provenance[part],
                    sampler.class_names,
                    pictures=folder / "train" if section["folder"] else None,
                )
            elif section["folder"]:
                synthetic.restore_pictures(path, folder / "train")
            artifacts.append(str(path.relative_to(stage.folder)))
            progress.advance(len(chosen[part]))
        progress.close()
        if section["folder"]:
            _write_metadata(folder / "train", provenance, sampler.class_names)
            artifacts.append(f"{name}/train/metadata.jsonl")
        constant += _warn_of_constant_images(folder)
    count = len(recipes) * len(section["sets"])
    stage.finish(artifacts, images=count, constant_images=constant)


class Sampler:
    """Recipes in, images out: the cache, the compiled sampler, the devices."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        mesh,
        batch_size: int,
        widths: mix.Widths,
    ):
        train = splits.read_split(workdir / "caption", "train")
        self._cache = open_cache(workdir / "encode")
        self.class_names = train.class_names
        self._workdir, self._mesh, self._batch_size = workdir, mesh, batch_size
        self._widths = widths
        self._base = diffusers_layout.recorded(
            workdir / "encode" / "base.json", workdir / "pretrain" / "model"
        )
        self._row_of = {row["id"]: i for i, row in enumerate(self._cache.rows)}
        self._key = rng.purpose_key(config.seed, "noise")
        self._steps = config.generate.steps
        self._settings = {"grey": train.grey}
        self._draw = None

    def load(self, name: str) -> tuple[dict, str]:
        """Parameters on the devices for a set, and the hash of their UNet."""
        folder, variant = self._workdir / "finetune" / "model", ""
        if name == "pretrained":
            folder, _ = checkpoint_folder.resolve(**self._base)
            variant = self._base["variant"]
        model, params = diffusers_layout.load(folder, ("vae", "unet"), variant)
        # The base's UNet, widened by zeros, ignores the source: text guidance alone.
        model, params = model.widened(params)
        shardings = sharding.tree_shardings(params, self._mesh)
        if self._draw is None:
            timesteps, step = model.ddim(self._steps)
            settings = self._settings | {"timesteps": timesteps, "step": step}
            draw = functools.partial(sample_images, model=model, **settings)
            self._draw = jax.jit(draw)
        unet = checkpoint_folder.weight_files(folder, "unet", variant)
        return jax.device_put(params, shardings), files.sha256(*unet)[:16]

    def images(self, params: dict, recipes: list[dict]) -> UInt8[np.ndarray, "N H W 3"]:
        """The images of `recipes`, whatever the batch they happen to be drawn in."""
        size = sharding.padded_size(self._batch_size, self._mesh)
        null = self._cache.null_states
        null = jax.device_put(null, sharding.replicated(self._mesh))
        drawn = []
        for start in range(0, len(recipes), size):
            batch = self._batch(recipes[start : start + size])
            batch = {k: sharding.pad_rows(v, size) for k, v in batch.items()}
            batch = jax.device_put(batch, sharding.batch_sharding(self._mesh))
            drawn.append(self._draw(params, batch, null, self._key))
        return np.concatenate([np.asarray(d) for d in drawn])[: len(recipes)]

    def _batch(self, recipes: list[dict]) -> dict[str, np.ndarray]:
        """What `sample_images` takes of recipes: these rows alone leave the disk."""
        length, width = self._cache.text_states.shape[1:]
        batch = mix.as_arrays(
            recipes, self._row_of, length=length, width=width, widths=self._widths
        )
        source, partners = batch.pop("source"), batch.pop("partners")
        batch["moments"] = self._cache.moments_of(source)
        batch["states"] = self._cache.states_of(source)
        states = self._cache.states_of(partners.ravel())
        batch["partner_states"] = states.reshape(*partners.shape, length, width)
        return batch


def sample_images(
    params: dict,
    batch: dict[str, Array],
    null_states: Float[Array, "L D"],
    key: Array,
    *,
    model: stable_diffusion.StableDiffusion,
    timesteps: Int[np.ndarray, " S"],
    step,
    grey: bool,
) -> UInt8[Array, "B H W 3"]:
    """Mixes, samples and decodes one batch; noise is a function of (key, noise_seed).

    Args:
      params: `unet` (conditioned) and `vae`.
      batch: `moments` [B, h, w, 2c] and `states` [B, L, D] of the sources,
        `partner_states` [B, M, L, D], and the rest of `mix.as_arrays`.
      null_states: of the empty prompt.
      key: root of the noise.
      model: the architecture.
      timesteps: of the solver.
      step: of the solver, as `samplers.sample` takes it.
      grey: average the colour channels, for a dataset without colour.
    """
    names = ("states", "partner_states", "positions", "donors", "dims", "dim_donors")
    states = jax.vmap(mix.mix)(*(batch[name] for name in names))
    keys = rng.example_keys(key, batch["noise_seed"])
    shape = (*batch["moments"].shape[1:3], model.latent_channels)
    latents = instruct_pix2pix.draw(
        functools.partial(model.denoise, params),
        rng.normal_like(keys, shape),
        batch["moments"],
        states,
        null_states,
        timesteps=timesteps,
        step=step,
        text_scale=batch["text_scale"],
        image_scale=batch["image_scale"],
    )
    return stable_diffusion.to_pixels(model.decode(params, latents), grey=grey)


def recipe_of_set(recipe: dict, name: str) -> dict:
    """The recipe as set `name` uses it: only `mixed` mixes."""
    if name == "mixed":
        return recipe
    return recipe | {"mode": name, **NOTHING}


def _provenance(
    recipe: dict, rows: dict[str, dict], config: ConfigDict, model_hash: str
) -> dict:
    section, row = config.generate, rows[recipe["source"]]
    return {
        **recipe,
        "label": row["label"],
        "prompt": row["prompt"],
        "seed": config.seed,
        "steps": section.steps,
        "sampler": "ddim",
        "model": model_hash,
    }


def _write_metadata(folder: epath.Path, provenance: list[dict], class_names) -> None:
    rows = []
    for row in provenance:
        name = class_names[row["label"]]
        file_name = synthetic.png_name(name, row["index"])
        rows.append({"file_name": file_name, **row, "label": name})
    files.write_jsonl(folder / "metadata.jsonl", rows)


def _warn_of_constant_images(folder: epath.Path) -> int:
    images = synthetic.read_images(folder)[0]
    constant = int((images.max((1, 2, 3)) == images.min((1, 2, 3))).sum())
    if constant:
        logging.warning("%s: %d images are one flat colour", folder, constant)
    return constant
