"""UNet, recipes -> the augmented dataset.

Reads: the fine-tuned model, `mix/recipes.jsonl`, `encode/`. Writes a dataset with a
card for each set of `generate.sets`, all from the same recipes and noise:
`generation/synthetic.py` describes its form, `generation/conditionings.py` the sets.
Images that cannot be used are drawn again, or left out. With `generate.limit` only a
sheet to look at is drawn.
"""

import contextlib
import dataclasses
from collections import Counter

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.checkpoints import dataset_card, diffusers_layout, model_card
from mvc_jax.data import decode, splits
from mvc_jax.data.cache import open_cache
from mvc_jax.diffusion import guidance_interval
from mvc_jax.errors import (
    UserError,
    require,
    require_disk_space,
    require_one_of,
    require_within,
)
from mvc_jax.generation import preview, synthetic
from mvc_jax.generation.ablation import Ablation, Needs
from mvc_jax.generation.background import Background
from mvc_jax.generation.conditionings import CONDITIONINGS, Texts, named
from mvc_jax.generation.sampler import Sampler, Settings, draw_again
from mvc_jax.mixing import operations, recipe_file
from mvc_jax.screening import removed, screener, selection
from mvc_jax.stage import (
    is_complete,
    open_stage,
    read_input,
    require_unchanged,
)
from mvc_jax.training import sharding
from mvc_jax.training.console import Progress

SETS = tuple(CONDITIONINGS)
# They change how fast it goes, or what is shown, but no image.
_NO_RESULT = ("batch_size", "attention", "limit", "conditioning")
_GROWS = ("generate.include_real", "generate.folder")
_CHOICES = {
    "format": tuple(synthetic.SUFFIXES),
    "sampler": ("ddim", "euler", "dpmpp_2m"),
    "dtype": ("auto", "float32", "bfloat16"),
    "attention": ("auto", "xla", "mapped", "cudnn"),
}
_COUNT = "configs/common.py has values that work."
_RANGES = {
    **dict.fromkeys(("batch_size", "shard_size"), (1, 1e9, _COUNT)),
    "steps": (1, 999, "It is less than the 1000 timesteps of training; 50 is usual."),
    "guidance_rescale": (0, 1, "0 switches it off; 0.7 is usual."),
    "size": (-1, 1e5, "0: as the model draws, -1: as the source was, else pixels."),
    "max_redraws": (0, 100, "3 is enough for accidents."),
    "limit": (0, 1000, "0 draws the dataset; 16 images make a sheet."),
    "noise_scale": (0, 1e3, "0.1 is a tenth of the states' standard deviation."),
    "interpolation": (0, 1, "It is the partner's share."),
}


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
    require_within("config.generate", section.to_dict(), _RANGES)
    require_one_of("config.generate", section.to_dict(), _CHOICES)
    drawn = {*section.sets}
    if section.conditioning != "all":  # which leaves out what there is not
        drawn |= {*named(section.conditioning)}
    for need in sorted({CONDITIONINGS[name].needs for name in drawn}):
        Needs.of(config.to_dict()).check(need)
    screener.check(config.to_dict())
    guidance_interval.check(section.guidance_interval)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Draws every set, shard by shard; what exists is kept."""
    workdir, section = epath.Path(workdir), config.generate
    read_input(workdir, "finetune", reader="generate")
    if section.limit:
        _draw_sheet(config, workdir)
        return
    shaping = {k: v for k, v in section.to_dict().items() if k not in _NO_RESULT}
    settings = {"seed": config.seed, "data": config.data.to_dict()}
    settings |= {"base": config.base.to_dict(), "generate": shaping}
    fresh = not is_complete(workdir, "generate")
    if fresh:  # before anything is written
        _require_same_weights(workdir)
    stage = open_stage(
        workdir,
        "generate",
        settings,
        ("finetune", "mix"),
        grows=_GROWS,
        grows_with=("mix",),
    )
    if stage.complete:
        _restore_pictures(stage.folder, section)
        _draw_figures(config, workdir, again=False)
        return
    job = _open(config, workdir)
    artifacts, counts, drawing = [], Counter(), False
    try:
        if not fresh:
            _require_same_weights(workdir)
        _require_room(job)
        plain = config.to_dict()
        screen = screener.open_screen(plain, workdir, job.train, job.recipes)
        drawing = True
        for name in section.sets:
            made, counted = _draw_set(job, name, screen)
            artifacts += [f"{name}/{file}" for file in made]
            counts += counted
    except UserError:
        if not (fresh or drawing) or not any(stage.folder.glob("*/data/*")):
            stage.abandon()  # nothing was added: other settings may follow
        raise
    _draw_figures(config, workdir, job)
    artifacts += screen.write_facts(stage.folder)
    counted = dict.fromkeys(("images", "redrawn", "left_out", *screen.counted), 0)
    stage.finish(artifacts, **counted | counts)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What all sets of a run share.

    Attributes:
      config: of the run.
      workdir: of the run.
      recipes: of all synthetic images.
      prompts: rows of `encode` by image id.
      train: the real images.
      sizes: (width, height) of each at the source, by id.
      sampler: opened.
    """

    config: ConfigDict
    workdir: epath.Path
    recipes: list[dict]
    prompts: dict[str, dict]
    train: splits.Split
    sizes: dict[str, tuple[int, int]]
    sampler: Sampler

    def sized(self, image: np.ndarray, source: str) -> np.ndarray:
        """An image as it is stored: by `generate.size`."""
        size, data = self.config.generate.size, self.config.data
        if size < 0:
            return decode.unfit(image, *self.sizes[source], resize=data.resize)
        smaller = size <= image.shape[0]
        resample = "area" if smaller else "lanczos"
        return decode.fit(image, size, resample=resample) if size else image


def _open(config: ConfigDict, workdir: epath.Path) -> _Job:
    section = config.generate
    prompts = files.read_jsonl(workdir / "encode" / "prompts.jsonl")
    recipes = recipe_file.read_recipes(workdir / "mix" / "recipes.jsonl")
    train = splits.read_split(workdir / "caption", "train")
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    texts = Texts(
        open_cache(workdir / "encode"),
        operations.widths_of([*recipes, *preview.read_levels(workdir)]),
        config.seed,
        section.noise_scale,
        section.interpolation,
        Ablation(
            needs=Needs.of(config.to_dict()),
            base=diffusers_layout.recorded_base(workdir),
            own_controlnet=workdir / "pretrain" / "controlnet",
            images=train.images,
            rows=prompts,
            class_type=config.data.class_type,
            mesh=mesh,
            batch_size=section.batch_size,
        ),
    )
    fields = {field.name for field in dataclasses.fields(Settings)} - {"grey"}
    settings = {name: section[name] for name in fields} | {"grey": train.grey}
    settings["guidance_interval"] = tuple(section.guidance_interval)
    rows = files.read_jsonl(workdir / "caption" / "images.jsonl")
    return _Job(
        config=config,
        workdir=workdir,
        recipes=recipes,
        prompts={row["id"]: row for row in prompts},
        train=train,
        sizes={row["id"]: (row["width"], row["height"]) for row in rows},
        sampler=Sampler(workdir, mesh, Settings(**settings), texts),
    )


def _store(job: _Job, name: str) -> synthetic.Store:
    section = job.config.generate
    return synthetic.Store(
        job.workdir / "generate" / name,
        job.train.class_names,
        job.sampler.model_hash(name),
        section.shard_size,
        section.format,
        section.folder,
    )


def _draw_set(
    job: _Job, name: str, screen: screener.Screen
) -> tuple[list[str], Counter]:
    """Draws what a set lacks, and completes its folder.

    Args:
      job: of the run.
      name: of the set.
      screen: the filters that leave images out.

    Returns:
      its files, relative to its folder, and counts for the manifest.
    """
    section, store = job.config.generate, _store(job, name)
    recipes = [CONDITIONINGS[name].recipe(recipe, name) for recipe in job.recipes]
    parts = store.missing(len(recipes))
    groups = [recipes[part.start : part.stop] for part in parts]
    done = len(recipes) - sum(map(len, groups))
    if parts:
        job.sampler.load(name)
    bad = Counter(selection.given_up(store.recorded("notes")))
    judge = screen.of_set(store.folder)
    progress = Progress(f"generate/{name}", len(recipes), done=done, unit="image")
    with contextlib.closing(progress), Background() as writer:
        drawing = zip(parts, groups, job.sampler.stream(groups), strict=True)
        for part, group, drawn in drawing:
            notes = draw_again(job.sampler.draw, group, drawn, section.max_redraws)
            done += len(group)
            bad.update(selection.given_up(notes))
            selection.require_few(name, bad, done, len(recipes))
            redraws = {note["index"]: note["redraws"] for note in notes}
            rows = [_provenance(job, recipe, store.model, redraws) for recipe in group]
            writer.submit(_write, job, store, part, drawn, rows, notes, judge)
            progress.advance(len(group))
    if section.include_real:
        _write_real(job, store)
    store.restore_pictures()
    listed, screened = screen.finish(store)
    names = store.finish() + listed
    names += dataset_card.write(store.folder, _facts(job, name, store))
    redrawn = sum(note["kept"] for note in store.recorded("notes"))
    images = len(store.labels())
    counts = {"images": images, "redrawn": redrawn, "left_out": len(recipes) - images}
    return names, Counter(counts | screened)


def _write(job: _Job, store, part, drawn, rows, notes, judge) -> None:
    """Chooses images, brings them to their size and writes them, beside the device."""
    kept, found = selection.judged(judge, drawn, rows)
    rows = [rows[place] for place in kept]
    images = [
        job.sized(drawn.images[place], row["source"])
        for place, row in zip(kept, rows, strict=True)
    ]
    store.write(part, images, rows, notes, found)


def _provenance(job: _Job, recipe: dict, model: str, redraws: dict[int, int]) -> dict:
    section, row = job.config.generate, job.prompts[recipe["source"]]
    return {
        **recipe,
        "label": row["label"],
        "prompt": row["prompt"],
        "seed": job.config.seed,
        "redraws": redraws.get(recipe["index"], 0),
        "steps": section.steps,
        "sampler": section.sampler,
        "guidance_interval": list(section.guidance_interval),
        "guidance_rescale": section.guidance_rescale,
        "model": model,
    }


def _write_real(job: _Job, store: synthetic.Store) -> None:
    """Writes the training images beside the synthetic ones, in the same form."""
    train = job.train
    for shard, start in enumerate(range(0, len(train.ids), store.shard_size)):
        part = range(start, min(start + store.shard_size, len(train.ids)))
        rows = [synthetic.real_row(i, job.prompts[train.ids[i]]) for i in part]
        images = [job.sized(train.images[i], train.ids[i]) for i in part]
        store.write_real(images, rows, shard)


def _require_room(job: _Job) -> None:
    """Refuses what the disk will not hold, of all sets, or what others have drawn.

    Images count as if they were not compressed.
    """
    section = job.config.generate
    stores = [_store(job, name) for name in section.sets]
    parts = [part for store in stores for part in store.missing(len(job.recipes))]
    images = sum(part.stop - part.start for part in parts)
    images += len(stores) * len(job.train.ids) * section.include_real
    side = section.size if section.size > 0 else job.config.data.size
    forms = 2 if section.folder else 1
    require_disk_space(
        job.workdir,
        images * forms * 3 * side**2,
        what=f"{images} images of {side} x {side} pixels in {forms} form(s)",
        fix="Free some or name a --workdir on another disk; "
        "--config.generate.folder=False needs half.",
    )


def _require_same_weights(workdir: epath.Path) -> None:
    """The models must be those that their stages wrote, byte for byte."""
    for stage in ("pretrain", "finetune"):
        if is_complete(workdir, stage):
            require_unchanged(workdir, stage, ".safetensors")


def _restore_pictures(folder: epath.Path, section: ConfigDict) -> None:
    """Writes pictures of finished sets that are no longer there."""
    for name in section.sets if section.folder else ():
        store = synthetic.Store(folder / name, (), "", section.shard_size)
        restored = store.restore_pictures()
        if restored:
            logging.info("generate/%s: %d pictures restored", name, restored)


def _facts(job: _Job, name: str, store: synthetic.Store) -> dataset_card.Facts:
    """What the card of a set tells."""
    config, names = job.config, job.train.class_names
    notes = store.recorded("notes")
    left_out = Counter(selection.given_up(notes))
    left_out += Counter(removed.reasons(store.recorded("removed")))
    counts = [
        np.bincount(store.labels(real=real), minlength=len(names)).tolist()
        for real in (False, True)
    ]
    side = config.generate.size or config.data.size
    dataset = files.read_json(job.workdir / "caption" / "dataset.json")
    base = job.sampler.base_folder()
    return dataset_card.Facts(
        set=name,
        about=CONDITIONINGS[name].about,
        dataset=dataset["name"],
        classes=names,
        counts=counts[0],
        real=counts[1],
        size=f"as the real images, at most {config.data.size} pixels along a side"
        if side < 0
        else f"{side} x {side} pixels",
        settings=dataset_card.in_words(
            config.to_dict(), mixes=CONDITIONINGS[name].partners is None
        )
        | {"weights": store.model},
        redrawn=Counter(note["reason"] for note in notes if note["kept"]),
        left_out=left_out,
        base=config.base.path or "made by the stage pretrain",
        license=model_card.base_license(base),
        pictures=config.generate.folder,
    )


def _draw_sheet(config: ConfigDict, workdir: epath.Path) -> None:
    """Draws only a sheet to look at, and leaves the stage as it is."""
    _require_same_weights(workdir)
    job = _open(config, workdir)
    preview.contact_sheet(
        workdir / "generate" / preview.CONTACT_SHEET,
        job.sampler,
        job.recipes,
        job.train,
        limit=config.generate.limit,
    )
    _draw_figures(config, workdir, job)


def _draw_figures(
    config: ConfigDict, workdir: epath.Path, job: _Job | None = None, again: bool = True
) -> None:
    """Draws what is asked for of the figures; only what is missing, if not `again`."""
    preview.figures(
        workdir / "generate",
        lambda: job or _open(config, workdir),
        names=named(config.generate.conditioning),
        optional=config.generate.conditioning == "all",
        levels=preview.read_levels(workdir),
        again=again,
    )
