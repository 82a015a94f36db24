"""UNet, recipes -> the augmented dataset.

Reads: the fine-tuned model, `mix/recipes.jsonl`, `encode/`. Writes a dataset with a
card for each set of `generate.sets`, all from the same recipes and noise:
`generation/synthetic.py` describes its files, `generation/conditionings.py` the sets.
Unusable images are redrawn or left out. With `generate.limit` only a contact sheet is
drawn.

Of many processes each draws some of the shards that are missing, of all sets, on its
own devices; the first makes the figures, the lists and the cards.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import files, processes
from mvc_jax.checkpoints import dataset_card, model_card
from mvc_jax.data import cache, splits
from mvc_jax.diffusion import timesteps
from mvc_jax.digests import Digests
from mvc_jax.errors import UserError
from mvc_jax.generation import conditionings, synthetic
from mvc_jax.mixing import recipe_file
from mvc_jax.screening.settings import FilterSettings, check_filters
from mvc_jax.stage import (
    Part,
    Spec,
    Stage,
    differences,
    is_complete,
    open_stage,
    read_manifest,
    require_inputs,
    same,
    without,
)
from mvc_jax.training.console import Progress
from mvc_jax.work import Sizes, Work

with epy.lazy_imports():
    from mvc_jax.checkpoints import diffusers_layout, pipeline_folder
    from mvc_jax.generation import (
        ablation,
        edits,
        figures,
        image_sampler,
        image_status,
        preview,
        set_writer,
        text_states,
    )
    from mvc_jax.mixing import operations
    from mvc_jax.screening import removed, screener, selection
    from mvc_jax.training import sharding

CONTACT_SHEET = "contact_sheet.png"
FIGURES = ("coarse_fine", "conditionings", "levels")  # 1 to 3, 4, 5 of the supplement
# Fields that change the speed or the figures, but no image.
_NO_RESULT = ("batch_size", "attention", "limit", "conditioning", "coarse_fine")
_OF_SETS = {  # fields that only these sets depend on
    "noise_scale": ("noised",),
    "interpolation": ("interpolated",),
    "strength": conditionings.RIVALS,
    "perturbation": ("gif_sd",),
    "soft_label_gamma": ("diff_mix",),
}
_ROW_BYTES = 600  # of the provenance of an image, in each of two forms
_GROWS = ("generate.include_real", "generate.folder")


def check(config: ConfigDict) -> None:
    """Checks the section `generate`."""
    section = config.generate
    if not section.sets:
        raise UserError(
            "config.generate.sets",
            wanted=f"at least one of {', '.join(conditionings.CONDITIONINGS)}",
            got="none",
            fix="Name one, or run the stages of real images alone: "
            "--config.stages=all leaves out the others.",
        )
    timesteps.require_noise(section.sampler, section.steps, section.timestep_spacing)
    names = {*section.sets}
    if section.conditioning != "all":  # which leaves out what cannot be drawn
        names |= {*conditionings.parse_names(section.conditioning)}
    if section.coarse_fine and "mixed" not in section.sets:
        raise UserError(
            "config.generate.coarse_fine",
            wanted="the set mixed in config.generate.sets, whose images it shows",
            got=f"{section.coarse_fine}, and the sets {', '.join(section.sets)}",
            fix="Add mixed to the sets, or set it to 0.",
        )
    if "diff_mix" in section.sets and section.filter.label:
        raise UserError(
            "config.generate.filter.label",
            wanted="'' with the set diff_mix: its labels are soft, and no classifier "
            "need predict one of their classes",
            got=repr(section.filter.label),
            fix="Set it to '', or draw diff_mix in a run of its own.",
        )
    check_filters(
        FilterSettings(**section.filter),
        # Recipes from a file may have any number of partners.
        partners=1 if config.mix.file else config.mix.partners,
        clip_path=section.clip,
        base_path=config.base.path,
        pretrain_image_encoder=config.pretrain.image_encoder.steps > 0,
    )
    needs = {conditionings.CONDITIONINGS[name].needs for name in names} - {""}
    for need in sorted(needs):
        ablation_models(config).check(need)


def price(config: ConfigDict, sizes: Sizes) -> Work:
    """What there is to draw, without figures and images that are drawn again."""
    section, base = config.generate, sizes.base
    sets, side = len(section.sets), config.data.size
    images = section.limit or sets * sizes.recipes
    each = [_evaluations(section, name) for name in section.sets]
    written = images + (sets * sizes.images if section.include_real else 0)
    stored = section.size if section.size > 0 else side
    shard = min(section.shard_size, sizes.recipes)
    speed = ("batch_size", "dtype", "attention", "filter", "format", "folder", "sets")
    raw = synthetic.raw_bytes(written, stored, pictures=section.folder)
    return Work(
        {"images": images, "UNet evaluations": round(images * sum(each) / sets)},
        unit="UNet evaluations",
        speed={
            **{name: section.to_dict()[name] for name in speed},
            "base": base.speed,
            "size": side,
            "mesh": config.mesh.to_dict(),
        },
        on_devices=True,
        disk={
            "images, if nothing is compressed": 0 if section.limit else raw,
            "their provenance": 0 if section.limit else 2 * _ROW_BYTES * written,
        },
        asks=0 if section.limit else raw,
        leaves=0,
        host={"the images of a shard": shard * 3 * side**2},
        devices={
            "weights": 2 * base.parameters["unet"],
            "a batch of images": section.batch_size
            * (3 * base.unet_bytes(side) + 4 * 3 * side**2),
        },
        lower=("generate.batch_size", "generate.shard_size"),
        remark=timesteps.start_in_words(
            section.sampler, section.steps, section.timestep_spacing
        ),
    )


def _evaluations(section: ConfigDict, name: str) -> float:
    """Predictions of the UNet for an image of a set, on average."""
    edits_ = conditionings.CONDITIONINGS[name].edits
    strengths = section.strength if edits_ else (1.0,)
    found = [
        timesteps.evaluations(
            section.sampler,
            section.steps,
            tuple(section.guidance_interval),
            section.timestep_spacing,
            strength=strength,
        )
        for strength in strengths
    ]
    return sum(found) / len(found)


def stage_spec(config: ConfigDict) -> Spec:
    """What the sets depend on; images can be added to them."""
    section = config.generate.to_dict()
    section["timestep_spacing"] = timesteps.named(section["timestep_spacing"])
    settings = {
        "seed": config.seed,
        "data": config.data.to_dict(),
        "base": config.base.to_dict(),
        "generate": {k: v for k, v in section.items() if k not in _NO_RESULT},
    }
    spacing = timesteps.EARLIER[section["sampler"]]
    return Spec(
        "generate",
        settings,
        inputs=("finetune", "mix"),
        earlier={"generate.timestep_spacing": spacing},
        grows=_GROWS,
        grows_with=("mix",),
        restores=("*/data/*.parquet", "*/removed.png"),
    )


def parts(
    config: ConfigDict, workdir: epath.PathLike, other: epath.PathLike
) -> list[Part]:
    """The sets of another workdir that would be drawn again as they are.

    Another `mix.tokens` does not change `unmixed` images, nor `finetune.steps` those of
    the base as it is.
    """
    workdir, other = epath.Path(workdir), epath.Path(other)
    spec = stage_spec(config)
    ours, theirs = spec.settings, read_manifest(other, "generate")["settings"]
    if not all(same(name, workdir, other) for name in ("caption", "encode")):
        return []
    same_model = same("finetune", workdir, other)
    recipes = [read_recipes(folder) for folder in (workdir, other)]
    filters = config.generate.filter  # which read the whole recipe
    screens = bool(filters.label or filters.copies or filters.outliers)
    found = []
    for name in {*config.generate.sets} & {*theirs["generate"]["sets"]}:
        conditioning = conditionings.CONDITIONINGS[name]
        unused = {"sets", *(x for x, sets in _OF_SETS.items() if name not in sets)}
        settings = [without(each, "generate", unused) for each in (ours, theirs)]
        if differences(*settings, earlier=spec.earlier):
            continue
        if conditioning.finetuned and not same_model:
            continue
        drawn = [
            rows if screens else [conditioning.applied(row, name) for row in rows]
            for rows in recipes
        ]
        if drawn[0] == drawn[1]:
            pictures = ("train",) if config.generate.folder else ()
            found.append(Part(name, [f"{name}/{x}" for x in ("data", *pictures)]))
    return found


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Draws every set, shard by shard; existing shards are kept."""
    workdir, section = epath.Path(workdir), config.generate
    if section.limit:
        sheet = functools.partial(draw_contact_sheet, config, workdir)
        processes.on_first("the contact sheet", sheet, processes.WORK_SECONDS)
        return
    was_complete = is_complete(workdir, "generate")
    stage = open_stage(workdir, stage_spec(config))
    if stage.complete:
        restore = functools.partial(restore_rest, config, workdir, stage)
        processes.on_first("pictures and figures", restore, processes.WORK_SECONDS)
        return
    drawing = False
    try:
        recipes, train = read_recipes(workdir), read_train(workdir)
        sampler = open_sampler(config, workdir, recipes, train)
        writers = open_writers(config, workdir, stage.digests, sampler, train)
        missing = find_missing(config, writers, len(recipes), real=len(train.ids))
        filters = screener.open_screener(
            FilterSettings(**section.filter),
            workdir=workdir,
            train=train,
            recipes=recipes,
            seed=config.seed,
            clip_path=section.clip,
            class_type=config.data.class_type,
        )
        drawing = True
        made = draw_sets(config, workdir, recipes, sampler, writers, missing, filters)
    except UserError as error:
        nothing_added = was_complete and not drawing
        together = error.shared or processes.count() == 1  # else others may be drawing
        if together and (nothing_added or not files.matching(stage.folder, "*/data/*")):
            stage.abandon()  # other settings are allowed
        raise

    def finish() -> list[str]:
        requested = requested_figures(config, workdir)
        draw_figures(config, workdir, requested, sampler, recipes, train)
        stage.digests.add(*figure_files(stage.folder, requested))
        return filters.write_facts(stage.folder)

    artifacts = processes.on_first("the figures", finish, processes.WORK_SECONDS)
    counts = Counter()
    for written, counted in made:
        artifacts = [*written, *artifacts]
        counts.update(counted)
    names = ("images", "redrawn", "left_out", *filters.count_names)
    stage.finish(artifacts, **{name: counts[name] for name in names})


def restore_rest(config: ConfigDict, workdir: epath.Path, stage: Stage) -> None:
    """Makes what is missing beside the shards of complete sets: pictures, figures."""
    restore_pictures(stage, config.generate)
    requested = requested_figures(config, workdir)
    missing = [x for x in requested if not _has_figure(stage, x)]
    if not missing:
        return
    require_inputs(workdir, stage_spec(config))
    recipes, train = read_recipes(workdir), read_train(workdir)
    sampler = None
    if missing != ["coarse_fine"]:  # which needs no model
        sampler = open_sampler(config, workdir, recipes, train)
    draw_figures(config, workdir, missing, sampler, recipes, train)
    stage.digests.add(*figure_files(stage.folder, missing))


def read_recipes(workdir: epath.Path) -> list[dict]:
    return recipe_file.read_recipes(workdir / "mix" / "recipes.jsonl")


def read_levels(workdir: epath.Path) -> list[dict]:
    """The recipes of Figure 5; [] without `mix.levels`."""
    path = workdir / "mix" / "levels.jsonl"
    return files.read_jsonl(path) if path.exists() else []


def read_train(workdir: epath.Path) -> splits.Split:
    return splits.read_split(workdir / "caption", "train")


def ablation_models(config: ConfigDict) -> ablation.AblationModels:
    return ablation.AblationModels(
        clip=config.generate.clip,
        controlnet=config.generate.controlnet,
        base=config.base.path,
        image_encoder_steps=config.pretrain.image_encoder.steps,
        controlnet_steps=config.pretrain.controlnet.steps,
        text_width=config.pretrain.text.width
        * (2 if config.pretrain.family == "sdxl" else 1),
    )


def open_sampler(
    config: ConfigDict,
    workdir: epath.Path,
    recipes: Sequence[dict],
    train: splits.Split,
) -> image_sampler.ImageSampler:
    """The sampler of the run; models are loaded later."""
    section = config.generate
    mesh = sharding.local_mesh(config.mesh.data, config.mesh.fsdp)
    encoded = cache.open_cache(workdir / "encode")
    inputs = text_states.TextInputs(
        cache=encoded,
        widths=operations.widths_of([*recipes, *read_levels(workdir)]),
        seed=config.seed,
        noise_scale=section.noise_scale,
        interpolation=section.interpolation,
        ablation=ablation.AblationInputs(
            models=ablation_models(config),
            base=diffusers_layout.recorded_base(workdir),
            own_controlnet=workdir / "pretrain" / "controlnet",
            images=train.images,
            rows=encoded.rows,
            class_type=config.data.class_type,
            mesh=mesh,
            batch_size=section.batch_size,
        ),
        edits=edits.Edits(
            strengths=tuple(section.strength),
            gamma=section.soft_label_gamma,
            ids=train.ids,
            labels=train.labels,
            classes=len(train.class_names),
            seed=config.seed,
        ),
    )
    settings = image_sampler.Settings(
        sampler=section.sampler,
        steps=section.steps,
        spacing=section.timestep_spacing,
        guidance_interval=tuple(section.guidance_interval),
        guidance_rescale=section.guidance_rescale,
        grey=train.grey,
        perturbation=section.perturbation,
        batch_size=section.batch_size,
        dtype=section.dtype,
        attention=section.attention,
    )
    return image_sampler.ImageSampler(workdir, mesh, settings, inputs)


def open_writers(
    config: ConfigDict,
    workdir: epath.Path,
    digests: Digests,
    sampler: image_sampler.ImageSampler,
    train: splits.Split,
) -> dict[str, set_writer.SetWriter]:
    """A writer for each set, in the order in which they are drawn."""
    section = config.generate
    names = sorted(section.sets, key=conditionings.model_order)
    models = processes.on_first(
        "the hashes of models", lambda: {x: sampler.model_hash(x) for x in names}
    )
    prompts = files.read_jsonl(workdir / "encode" / "prompts.jsonl")
    images = files.read_jsonl(workdir / "caption" / "images.jsonl")
    sizes = {row["id"]: (row["width"], row["height"]) for row in images}
    of_base = synthetic.OF_XL if sampler.has_pooled else {}
    starts_from_source = {x for x in names if conditionings.CONDITIONINGS[x].edits}
    further = {
        name: of_base | (edits.COLUMNS if name in starts_from_source else {})
        for name in names
    }
    return {
        name: set_writer.SetWriter(
            store=synthetic.Store(
                folder=workdir / "generate" / name,
                digests=digests,
                class_names=train.class_names,
                model=models[name],
                shard_size=section.shard_size,
                format=section.format,
                pictures=section.folder,
                further=further[name],
                class_folders=train.class_folders
                or tuple(map(synthetic.earlier_class_folder, train.class_names)),
            ),
            train=train,
            prompts={row["id"]: row for row in prompts},
            source_sizes=sizes,
            size=section.size,
            resize=config.data.resize,
            seed=config.seed,
            settings=sampler.settings,
        )
        for name in names
    }


@dataclasses.dataclass(frozen=True)
class Missing:
    """What is missing of a set before it is drawn.

    Attributes:
      count: number of its images that are missing.
      mine: those that this process draws, by shard.
      unusable: of the others, how many stayed unusable, by the reason.
    """

    count: int
    mine: Sequence[synthetic.Part]
    unusable: Mapping[str, int] = dataclasses.field(default_factory=dict)


def find_missing(
    config: ConfigDict,
    writers: Mapping[str, set_writer.SetWriter],
    recipes: int,
    *,
    real: int,
) -> dict[str, Missing]:
    """Finds the missing images of all sets, and shares them out among the processes.

    Args:
      config: of the run.
      writers: of the sets, in the order of drawing.
      recipes: number of them.
      real: number of training images.

    Raises:
      UserError: the disk has no room for them.
    """
    section = config.generate
    stores = [writer.store for writer in writers.values()]

    def find() -> list[Any]:
        found = [store.missing(recipes) for store in stores]
        set_writer.require_space_for_sets(
            stores,
            sum(part.stop - part.start for parts in found for part in parts)
            + (len(stores) * real if section.include_real else 0),
            side=section.size if section.size > 0 else config.data.size,
        )
        notes = [store.recorded("notes") for store in stores]
        unusable = [Counter(selection.unusable_reasons(each)) for each in notes]
        places = [
            [(part.shard, part.start, part.stop) for part in parts] for parts in found
        ]
        return [*zip(writers, places, unusable, strict=True)]

    found = processes.on_first("the images that are missing", find)
    parts = [
        (name, synthetic.Part(writers[name].store.folder, *place))
        for name, places, _ in found
        for place in places
    ]
    mine = processes.share(parts, [part.stop - part.start for _, part in parts])
    return {
        name: Missing(
            sum(stop - start for _, start, stop in places),
            [part for set_, part in mine if set_ == name],
            unusable,
        )
        for name, places, unusable in found
    }


def draw_sets(
    config: ConfigDict,
    workdir: epath.Path,
    recipes: Sequence[dict],
    sampler: image_sampler.ImageSampler,
    writers: Mapping[str, set_writer.SetWriter],
    missing: Mapping[str, Missing],
    filters: screener.Screener,
) -> list[tuple[list[str], dict[str, int]]]:
    """Draws what is missing of all sets, and finishes them.

    A single process finishes each set before it draws the next. Many do not, so that
    none waits for the others after each set.

    Returns:
      for each set its files, relative to the stage's folder, and its counts.
    """
    section, made = config.generate, []
    rounds = [[*writers]]
    if processes.count() == 1:
        rounds = [[name] for name in writers]
    for names in rounds:
        for name in names:
            draw_set(
                name,
                recipes,
                sampler,
                writers[name],
                missing[name],
                filters,
                section.max_redraws,
            )
            if section.include_real:
                writers[name].write_real()

        def finish(names: Sequence[str] = names) -> list[Any]:
            stores = [writers[name].store for name in names]
            return [
                finish_set(config, workdir, x, len(recipes), filters) for x in stores
            ]

        processes.barrier("the end of drawing", processes.WORK_SECONDS)
        made += map(
            tuple,
            processes.on_first("the lists of sets", finish, processes.WORK_SECONDS),
        )
    return made


def draw_set(
    name: str,
    recipes: Sequence[dict],
    sampler: image_sampler.ImageSampler,
    writer: set_writer.SetWriter,
    missing: Missing,
    filters: screener.Screener,
    max_redraws: int,
) -> None:
    """Draws this process's images of a set; writes a shard while drawing the next."""
    conditioning, total = conditionings.CONDITIONINGS[name], len(recipes)
    groups = [
        [
            conditioning.applied(x, name, sampler.edits)
            for x in recipes[part.start : part.stop]
        ]
        for part in missing.mine
    ]
    done = total - missing.count
    unusable = Counter(missing.unusable)
    screen = filters.for_set(writer.store.folder)
    select = functools.partial(selection.select, screen=screen)
    if groups:
        sampler.load(name)
    progress = Progress(f"generate/{name}", total, done=done, unit="image", shared=True)
    with (
        contextlib.closing(progress),
        concurrent.futures.ThreadPoolExecutor(1) as thread,
    ):
        writing = None
        shards = zip(
            missing.mine,
            groups,
            sampler.stream(groups, advance=progress.advance),
            strict=True,
        )
        for part, group, drawn in shards:
            notes = image_status.redraw_unusable(
                sampler.draw, group, drawn, max_redraws
            )
            done += len(group)
            unusable.update(selection.unusable_reasons(notes))
            selection.require_few_unusable(name, unusable, done, total)
            if writing is not None:
                writing.result()  # raises what the thread raised
            writing = thread.submit(writer.write, part, group, drawn, notes, select)
        if writing is not None:
            writing.result()


def finish_set(
    config: ConfigDict,
    workdir: epath.Path,
    store: synthetic.Store,
    recipes: int,
    filters: screener.Screener,
) -> tuple[list[str], dict[str, int]]:
    """Writes the lists and the card of a set whose shards are complete.

    Returns:
      the files of the set, relative to the stage's folder, and counts for the manifest.
    """
    name = store.folder.name
    labels, notes = store.labels(), store.recorded("notes")
    removed_rows = store.recorded("removed")
    listed, removed_counts = filters.finish_set(store.folder, removed_rows, labels)
    written = store.finish() + listed
    left_out = Counter(selection.unusable_reasons(notes))
    selection.require_few_unusable(name, left_out, recipes, recipes)
    left_out.update(removed.reasons(removed_rows))
    side = config.generate.size or config.data.size
    base_folder, _ = pipeline_folder.resolve(**diffusers_layout.recorded_base(workdir))
    facts = dataset_card.Facts(
        set=name,
        about=conditionings.CONDITIONINGS[name].about,
        dataset=files.read_json(workdir / "caption" / "dataset.json")["name"],
        classes=store.class_names,
        folders=store.folders,
        counts=class_counts(labels, store.class_names),
        real=class_counts(store.labels(real=True), store.class_names),
        size=f"as the real images, at most {config.data.size} pixels along a side"
        if side < 0
        else f"{side} x {side} pixels",
        settings={
            **settings_in_words(config, name),
            **unchanged_in_words(workdir, name),
            "weights": store.model,
        },
        redrawn=Counter(note["reason"] for note in notes if note["kept"]),
        left_out=left_out,
        base=config.base.path or "made by the stage pretrain",
        license=model_card.base_license(base_folder),
        pictures=store.pictures,
    )
    written += dataset_card.write(store.folder, facts)
    redrawn = sum(note["kept"] for note in notes)
    return [f"{name}/{file}" for file in written], {
        "images": len(labels),
        "redrawn": redrawn,
        "left_out": recipes - len(labels),
        **removed_counts,
    }


def class_counts(labels: np.ndarray, class_names: Sequence[str]) -> list[int]:
    return np.bincount(labels, minlength=len(class_names)).tolist()


def settings_in_words(config: ConfigDict, name: str) -> dict[str, Any]:
    """How the images of a set were drawn, for its card."""
    mix, section, filters = config.mix, config.generate, config.generate.filter
    mixing = dataset_card.mixing_in_words(
        modes=mix.modes,
        tokens=(mix.tokens, mix.tokens_most),
        positions=mix.positions,
        dims=mix.dims,
        dims_on=mix.dims_on,
        partners=mix.partners,
        partner=mix.partner,
        prefers_other_prompts=mix.partner_prompt != "any",
    )
    conditioning = conditionings.CONDITIONINGS[name]
    mixes = conditioning.partners is None and not mix.file
    return dataset_card.in_words(
        seed=config.seed,
        per_image=None if mix.file else mix.per_image,
        mixing=mixing if mixes else None,
        text_scale=(section.text_scale, section.text_scale_most),
        image_scale=(section.image_scale, section.image_scale_most),
        strengths=tuple(section.strength) if conditioning.edits else (),
        gamma=section.soft_label_gamma if conditioning.towards else None,
        perturbation=section.perturbation if conditioning.perturbed else None,
        sampler=section.sampler,
        steps=section.steps,
        spacing=timesteps.named(section.timestep_spacing),
        guidance_interval=tuple(section.guidance_interval),
        guidance_rescale=section.guidance_rescale,
        filters=dataset_card.filters_in_words(
            label=filters.label,
            label_folds=filters.label_folds,
            label_threshold=filters.label_threshold,
            label_top=filters.label_top,
            copies=filters.copies,
            copies_quantile=filters.copies_quantile,
            outliers=filters.outliers,
            outliers_quantile=filters.outliers_quantile,
        ),
    )


def unchanged_in_words(workdir: epath.Path, name: str) -> dict[str, str]:
    """How many recipes change nothing, for the card of a set that mixes.

    Empty where a version of `mix` made them that did not count them.
    """
    counts = read_manifest(workdir, "mix")["counts"]
    if conditionings.CONDITIONINGS[name].partners is not None:
        return {}
    if "unchanged" not in counts:
        return {}
    words = f"{counts['unchanged']} of {counts['recipes']}"
    return {"recipes that change nothing": words}


def restore_pictures(stage: Stage, section: ConfigDict) -> None:
    """Writes image files of complete sets that were deleted or damaged."""
    for name in section.sets if section.folder else ():
        folder, digests = stage.folder / name, stage.digests
        listed = synthetic.listed_pictures(folder, digests)
        restored = synthetic.restore_pictures(folder, digests, listed)
        if restored:
            logging.info("generate/%s: %d pictures restored", name, restored)


def draw_contact_sheet(config: ConfigDict, workdir: epath.Path) -> None:
    """Draws the contact sheet and the figures, without opening the stage."""
    require_inputs(workdir, stage_spec(config))
    recipes, train = read_recipes(workdir), read_train(workdir)
    sampler = open_sampler(config, workdir, recipes, train)
    sheet = preview.contact_sheet(
        cells_of(config, workdir, sampler, train), recipes, limit=config.generate.limit
    )
    path = workdir / "generate" / CONTACT_SHEET
    files.write_bytes(path, figures.png(sheet, panels=0))
    requested = requested_figures(config, workdir)
    draw_figures(config, workdir, requested, sampler, recipes, train)


def cells_of(
    config: ConfigDict,
    workdir: epath.Path,
    sampler: image_sampler.ImageSampler | None,
    train: splits.Split,
) -> preview.Cells:
    rows = files.read_jsonl(workdir / "encode" / "prompts.jsonl")
    prompts = {row["id"]: row["prompt"] for row in rows}
    return preview.Cells(train, prompts, sampler, config.seed)


def requested_figures(config: ConfigDict, workdir: epath.Path) -> list[str]:
    """Those of `FIGURES` that are asked for.

    By `generate.coarse_fine`, which needs a whole set, `generate.conditioning` and
    `mix.levels`.
    """
    wanted = (
        config.generate.coarse_fine and not config.generate.limit,
        conditionings.parse_names(config.generate.conditioning),
        read_levels(workdir),
    )
    return [x for x, is_wanted in zip(FIGURES, wanted, strict=True) if is_wanted]


def figure_files(folder: epath.Path, names: Sequence[str]) -> list[epath.Path]:
    return [path for name in names for path in figures.paths(folder, name)]


def _has_figure(stage: Stage, name: str) -> bool:
    """Whether a figure is there; that of an older version has no data."""
    data, picture = (stage.folder / f"{name}{x}" for x in (".parquet", ".png"))
    is_older = data.name not in stage.digests.recorded()
    intact = stage.digests.intact
    return intact(picture) and (is_older or intact(data))


def draw_figures(
    config: ConfigDict,
    workdir: epath.Path,
    names: Sequence[str],
    sampler: image_sampler.ImageSampler | None,
    recipes: Sequence[dict],
    train: splits.Split,
) -> None:
    """Draws some of `requested_figures`."""
    folder, conditioning = workdir / "generate", config.generate.conditioning
    cells = cells_of(config, workdir, sampler, train) if names else None
    for name in names:
        if name == "coarse_fine":
            rows = config.generate.coarse_fine
            figure = preview.coarse_fine_figure(cells, folder / "mixed", rows=rows)
        elif name == "conditionings":
            figure, left_out = preview.conditioning_figure(
                cells,
                recipes,
                names=conditionings.parse_names(conditioning),
                optional=conditioning == "all",
            )
            for sentence in left_out:
                logging.warning("generate.conditioning: %s", sentence)
        else:
            figure = preview.level_figure(cells, read_levels(workdir))
        figures.write(folder, name, figure)
