"""Captions, labels -> mixing recipes.

Reads: `encode/prompts.jsonl`, and the user's own recipes if `mix.file` is set. Writes:
`recipes.jsonl`, a row for each synthetic image (`mixing/recipes.py` describes the
fields); with `mix.levels` also `levels.jsonl`, the recipes of the supplement's Figure
5. Row k depends only on (seed, k): raising `mix.per_image` appends rows.
"""

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.data import cache, captions, shards
from mvc_jax.errors import UserError
from mvc_jax.mixing import checks, recipe_file, recipes, unchanged
from mvc_jax.stage import Spec, open_stage
from mvc_jax.work import Sizes, Work

_SCALES = ("text_scale", "image_scale")  # fields of `generate`
_SOURCE = recipes.POOLED[0]
_ROW_BYTES = 250  # of a recipe in its file; the digits' have 280
_OBJECT_BYTES = 1500  # of a recipe in memory, at least; the digits' have 2050


def check(config: ConfigDict) -> None:
    """Checks the section `mix`, and the scales of `generate`, which are drawn here."""
    section = config.mix
    _check_maximum("mix.tokens", section.tokens, section.tokens_most)
    for name in _SCALES:
        scale = config.generate[name]
        _check_maximum(f"generate.{name}", scale, config.generate[f"{name}_most"])
    length = width = None
    if not config.base.path:
        pretrain = config.pretrain
        encoders = 2 if pretrain.family == "sdxl" else 1
        # If it is as long as the prompts, `run` knows how long that is.
        length = pretrain.context_length or captions.LONGEST
        width = encoders * pretrain.text.width
        _check_fits(section, length, width)
        if encoders == 1:
            _require_source_pooled(section.pooled)
    if section.file:  # its ids are checked by `run`
        recipe_file.read_recipes(section.file, length=length, width=width)


def count(config: ConfigDict, images: int) -> int:
    """Number of recipes, which is that of the images of a set.

    Args:
      config: of the run.
      images: number of training images.

    Raises:
      UserError: the user's file of recipes is not valid.
    """
    if config.mix.file:
        return len(recipe_file.read_recipes(config.mix.file))
    return config.mix.per_image * images


def price(config: ConfigDict, sizes: Sizes) -> Work:
    """How many recipes there are to draw."""
    return Work(
        {"recipes": sizes.recipes},
        unit="recipes",
        speed={"modes": config.mix.modes, "dims_per_token": config.mix.dims_per_token},
        disk={"recipes": _ROW_BYTES * sizes.recipes},
        host={"the recipes": _OBJECT_BYTES * sizes.recipes},
        lower=("mix.per_image",),
    )


def stage_spec(config: ConfigDict) -> Spec:
    """What the recipes depend on; more of them leave the earlier ones unchanged."""
    section = config.mix.to_dict()
    section["partner_prompt"] = partner_prompt(section["partner_prompt"])
    if section["file"]:  # whose content counts, and determines the number of recipes
        section.pop("per_image")
        section.pop("partner_prompt")
        path = epath.Path(section["file"])
        section["file_sha256"] = files.sha256(path) if path.is_file() else ""
    names = [name for scale in _SCALES for name in (scale, f"{scale}_most")]
    scales = {name: config.generate[name] for name in names}
    return Spec(
        "mix",
        {"seed": config.seed, "mix": section, "generate": scales},
        inputs=("encode",),
        grows=("mix.levels", "mix.per_image"),
        earlier={"mix.partner_prompt": recipes.EARLIER_PARTNER_PROMPT},
        named_files={"mix.file": "mix.file_sha256"},
    )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Draws a recipe for every synthetic image, or copies the user's."""
    workdir, section = epath.Path(workdir), config.mix
    stage = open_stage(workdir, stage_spec(config))
    if stage.complete:
        return
    rows = files.read_jsonl(workdir / "encode" / "prompts.jsonl")
    states = shards.Shards(workdir / "encode" / "text_states")
    _, length, width = states.shape
    shape = {"length": length, "width": width}
    has_pooled = (workdir / "encode" / cache.TIME_IDS).exists()
    drawing, classes = drawing_of(config, has_pooled), recipes.classes_of(rows)
    try:
        if not has_pooled:
            _require_source_pooled(section.pooled)
        _check_fits(section, length, width)
        if section.file:
            made = recipe_file.read_recipes(
                section.file, rows, any_partner=section.partner == "any", **shape
            )
            checks.warn_of_other_scales(made, drawing)
            for recipe in made if not has_pooled else ():
                _require_source_pooled(recipe.get("pooled", _SOURCE), section.file)
        else:
            made = [
                recipes.make_recipe(
                    k, rows, classes, drawing, seed=config.seed, **shape
                )
                for k in range(count(config, len(rows)))
            ]
            checks.require_tokens(made, drawing, rows)
            checks.require_dims(made, drawing)
        written = {"recipes.jsonl": files.jsonl(made)}
        stage.require_prefix("recipes.jsonl", written["recipes.jsonl"].encode())
    except UserError:
        stage.abandon()  # nothing was written: other settings are allowed
        raise
    if not section.file:
        checks.warn_of_few_partners(rows, classes, drawing)
    if section.levels:
        levels = recipes.make_levels(rows, classes, drawing, seed=config.seed, **shape)
        written["levels.jsonl"] = files.jsonl(levels)
    for name, text in written.items():
        files.write_text(stage.folder / name, text)
    logging.info("%d recipes", len(made))
    are_unchanged = unchanged.unchanged(made, rows, states.row)
    unchanged.warn(made, are_unchanged)
    stage.finish(list(written), recipes=len(made), unchanged=sum(are_unchanged))


def partner_prompt(chosen: str) -> str:
    """What `mix.partner_prompt` stands for."""
    return recipes.Drawing.partner_prompt if chosen == "auto" else chosen


def drawing_of(config: ConfigDict, has_pooled: bool = False) -> recipes.Drawing:
    """How recipes are drawn: fields of `mix`, and the scales of `generate`.

    Args:
      config: of the run.
      has_pooled: whether the UNet is given pooled embeddings, as that of XL is.
    """
    section, scales = config.mix, config.generate
    return recipes.Drawing(
        modes=tuple(section.modes),
        tokens=section.tokens,
        tokens_most=section.tokens_most,
        positions=section.positions,
        class_prompt=section.class_prompt,
        partner=section.partner,
        partners=section.partners,
        partner_prompt=partner_prompt(section.partner_prompt),
        dims=section.dims,
        dims_per_token=section.dims_per_token,
        dims_on=section.dims_on,
        text_scale=(
            scales.text_scale,
            max(scales.text_scale, scales.text_scale_most),
        ),
        image_scale=(
            scales.image_scale,
            max(scales.image_scale, scales.image_scale_most),
        ),
        pooled=section.pooled if has_pooled else "",
    )


def _require_source_pooled(
    chosen: str, field: epath.PathLike = "config.mix.pooled"
) -> None:
    """Raises a `UserError` if pooled embeddings that are not there would be mixed."""
    if chosen != _SOURCE:
        raise UserError(
            str(field),
            wanted=f"pooled={_SOURCE} for a base without pooled embeddings: only "
            "Stable Diffusion XL has them",
            got=f"{chosen}",
            fix="Use that, or a Stable Diffusion XL in config.base.path.",
        )


def _check_maximum(name: str, low: float | int, high: float | int) -> None:
    """Checks that the field `{name}_most` is 0, for no range, or at least `low`."""
    if high == 0 or low <= high:
        return
    raise UserError(
        f"config.{name}_most",
        wanted=f"0, or a number of at least config.{name} = {low:g}",
        got=f"{high}",
        fix=f"0 always uses config.{name}; otherwise each image draws a number between "
        "the two.",
    )


def _check_fits(section: ConfigDict, length: int, width: int) -> None:
    """Checks `tokens` and `dims` against the shape of text states."""
    if section.dims > width:
        raise UserError(
            "config.mix.dims",
            wanted=f"at most the {width} dims of a text state",
            got=f"{section.dims}",
            fix="The paper replaces fewer than 10 of 768.",
        )
    if section.tokens >= length:
        raise UserError(
            "config.mix.tokens",
            wanted=f"fewer than the {length} tokens of a prompt, as BOS is not mixed",
            got=f"{section.tokens}",
            fix="Lower it; the default is 4.",
        )
