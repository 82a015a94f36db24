"""Captions, labels -> mixing recipes; and the pure operations that apply them.

Reads: `encode/prompts.jsonl`, and the user's own recipes where `mix.file` names some.
Writes: `recipes.jsonl`, one row for each synthetic image (`mixing/recipes.py` has the
fields); with `mix.levels` also `levels.jsonl`, which mix more and more, for Figure 5 of
the supplement. Row k depends on (seed, k) alone: raising `mix.per_image` appends.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.data import shards
from mvc_jax.errors import UserError, require, require_one_of, require_within
from mvc_jax.mixing import recipe_file, recipes
from mvc_jax.stage import open_stage

_SCALES = ("text_scale", "image_scale")
_INFINITE = float("inf")
_NAMED = 5  # classes in a warning


def check(config: ConfigDict) -> None:
    """Checks the section `mix`, and the scales of `generate`, which it draws."""
    section = config.mix
    require(
        section.per_image > 0,
        "config.mix.per_image",
        wanted="at least 1",
        got=section.per_image,
        fix="The paper makes 3 to 4.",
    )
    require(
        len(section.modes) > 0 and set(section.modes) <= set(recipes.MODES),
        "config.mix.modes",
        wanted=f"some of {', '.join(recipes.MODES)}",
        got=tuple(section.modes),
        fix="Name these.",
    )
    choices = {"positions": recipes.POSITIONS, "partner": recipes.PARTNERS}
    choices["dims_on"] = recipes.DIMS_ON
    require_one_of("config.mix", section.to_dict(), choices)
    ranges = {"tokens": (0, _INFINITE, "0 mixes none; the default is 4.")}
    ranges["dims"] = (0, _INFINITE, "The paper replaces fewer than 10 of 768.")
    ranges["partners"] = (1, _INFINITE, "One is the paper's.")
    require_within("config.mix", section.to_dict(), ranges)
    _check_range(section, "mix.tokens")
    for name in _SCALES:
        fix = "InstructPix2Pix uses 7.5 for text and 1.5 for the image."
        require(
            0 <= config.generate[name] < _INFINITE,
            f"config.generate.{name}",
            wanted="a number of at least 0",
            got=config.generate[name],
            fix=fix,
        )
        _check_range(config.generate, f"generate.{name}")
    shape = {}
    if not config.base.path:
        width = config.pretrain.text.width
        shape = {"length": config.pretrain.context_length, "width": width}
        _check_room(section, **shape)
    if section.file:  # ids can wait: `encode` knows them
        recipe_file.read_recipes(section.file, **shape)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Draws a recipe for every synthetic image, or takes over the user's."""
    workdir = epath.Path(workdir)
    # More recipes leave the earlier ones what they are; a user's file says how many.
    grows = ("mix.levels",) if config.mix.file else ("mix.levels", "mix.per_image")
    stage = open_stage(
        workdir, "mix", settings_of(config), inputs=("encode",), grows=grows
    )
    if stage.complete:
        return
    rows = files.read_jsonl(workdir / "encode" / "prompts.jsonl")
    _, length, width = shards.Shards(workdir / "encode" / "text_states").shape
    shape = {"length": length, "width": width}
    drawing = drawing_of(config)
    classes = recipes.classes_of(rows)
    more = {"seed": config.seed, **shape}
    written = {}
    try:
        _check_room(config.mix, length, width)
        if config.mix.file:
            any_partner = drawing.partner == "any"
            made = recipe_file.read_recipes(
                config.mix.file, rows, **shape, any_partner=any_partner
            )
        else:
            count = config.mix.per_image * len(rows)
            draw = recipes.make_recipe
            made = [draw(k, rows, classes, drawing, **more) for k in range(count)]
            _require_words(made, drawing, rows)
            _require_dims(made, drawing)
        written["recipes.jsonl"] = files.jsonl(made)
        stage.require_prefix("recipes.jsonl", written["recipes.jsonl"].encode())
    except UserError:  # nothing is kept, so that the way out may be another setting
        stage.abandon()
        raise
    if not config.mix.file:
        _warn_of_few_partners(rows, classes, drawing)
    if config.mix.levels:
        levels = recipes.make_levels(rows, classes, drawing, **more)
        written["levels.jsonl"] = files.jsonl(levels)
    for name, text in written.items():
        files.write_text(stage.folder / name, text)
    logging.info("%d recipes", len(made))
    stage.finish(list(written), recipes=len(made))


def drawing_of(config: ConfigDict) -> recipes.Drawing:
    """The fields of `mix`, and of `generate`, that say how recipes are drawn."""
    names = {field.name for field in dataclasses.fields(recipes.Drawing)}
    fields = {name: config.mix[name] for name in names - {*_SCALES}}
    for name in _SCALES:
        least, most = config.generate[name], config.generate[f"{name}_most"]
        fields[name] = (least, max(least, most))
    return recipes.Drawing(**fields | {"modes": tuple(config.mix.modes)})


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """What shapes the recipes, as the stage's manifest has it."""
    section = config.mix.to_dict()
    if section["file"]:  # or an edit of it would go unnoticed
        section.pop("per_image")
        path = epath.Path(section["file"])
        section["file_sha256"] = files.sha256(path) if path.is_file() else ""
    names = [name for scale in _SCALES for name in (scale, f"{scale}_most")]
    scales = {name: config.generate[name] for name in names}
    return {"seed": config.seed, "mix": section, "generate": scales}


def _check_range(section: ConfigDict, name: str) -> None:
    """`X_most` is 0, for no range, or not below `X`."""
    field = name.partition(".")[2]
    least, most = section[field], section[f"{field}_most"]
    require(
        most == 0 or least <= most < _INFINITE,
        f"config.{name}_most",
        wanted=f"0, or a number of at least config.{name} = {least:g}",
        got=most,
        fix=f"0 keeps to {field}; above it, each image draws its own.",
    )


def _check_room(section: ConfigDict, length: int, width: int) -> None:
    require(
        section.dims <= width,
        "config.mix.dims",
        wanted=f"at most the {width} dims of a text state",
        got=section.dims,
        fix="The paper replaces fewer than 10 of 768.",
    )
    require(
        section.tokens < length,
        "config.mix.tokens",
        wanted=f"fewer than the {length} tokens of a prompt, of which BOS stays",
        got=section.tokens,
        fix="Lower it; the default is 4.",
    )


def _require_words(
    made: Sequence[Mapping], drawing: recipes.Drawing, rows: Sequence[Mapping]
) -> None:
    """Some images may be short of words to mix, which is said; all may not."""
    counts = [len(r["positions"]) for r in made if r["mode"] != "fine"]
    short = sum(count < drawing.tokens for count in counts)
    longest = max(rows, key=lambda row: row["caption_tokens"])
    if short and short == len(counts):
        raise UserError(
            "config.mix.tokens",
            wanted="a number of tokens that some image has to mix",
            got=f"{drawing.tokens}, where none has more than {max(counts)}: source and "
            f"partners must each have as many; the longest caption, of {longest['id']} "
            f"({longest['prompt']!r}), has {longest['caption_tokens']}",
            fix="Lower it, or let more be mixed: --config.mix.class_prompt=True, or "
            "--config.mix.positions=all; or longer captions.",
        )
    if short:
        logging.warning(
            "%d of %d recipes take over fewer than %d tokens (config.mix.tokens), all "
            "that source and partners have in common",
            short,
            len(counts),
            drawing.tokens,
        )


def _require_dims(made: Sequence[Mapping], drawing: recipes.Drawing) -> None:
    """Words in common may be lacking for `mix.dims_on=words`: as `_require_words`."""
    fine = [r for r in made if r["mode"] != "coarse"]
    bare = sum(not r["dims"] for r in fine) if drawing.dims else 0
    if bare and bare == len(fine):
        raise UserError(
            "config.mix.dims_on",
            wanted="tokens whose dims some image can mix",
            got=f"{drawing.dims_on!r}, where no source has words in common with its "
            "partners",
            fix="Set --config.mix.dims_on=all, or --config.mix.class_prompt=True.",
        )
    if bare:
        logging.warning(
            "%d of %d recipes take over no dims (config.mix.dims_on=%s): source and "
            "partners have no words in common",
            bare,
            len(fine),
            drawing.dims_on,
        )


def _warn_of_few_partners(
    rows: Sequence[Mapping],
    classes: Mapping[int, Sequence[int]],
    drawing: recipes.Drawing,
) -> None:
    groups = {rows[m[0]]["class_name"]: len(m) for m in classes.values()}
    if drawing.partner == "any":
        groups = {"all classes together": len(rows)}
    lone = [name for name, count in groups.items() if count == 1]
    few = [name for name, n in groups.items() if 1 < n <= drawing.partners]
    if lone:
        logging.warning(
            "one training image, with nothing to mix it with but itself, in: %s",
            _named(lone),
        )
    if few:
        logging.warning(
            "fewer than %d other images (config.mix.partners); all there are mix, in: "
            "%s",
            drawing.partners,
            _named(few),
        )


def _named(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
