"""Captions, labels -> mixing recipes; and the pure operations that apply them.

Reads: `encode/prompts.jsonl`, and the user's own recipes where `mix.file` names some.
Writes: `recipes.jsonl`, one row for each synthetic image (`data/recipes.py` has the
fields); with `mix.levels` also `levels.jsonl`, which mix more and more, for Figure 5 of
the supplement. Row k depends on (seed, k) alone: raising `mix.per_image` appends.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.data import manifest, recipe_file, recipes, shards
from mvc_jax.errors import UserError, require, require_one_of, require_within

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
    stage = manifest.open_stage(
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
            *(bare, len(fine), drawing.dims_on),
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


def coarse_mix(
    states: Float[Array, "L D"],
    partners: Float[Array, "M L D"],
    positions: Int[Array, " k"],
    donors: Int[Array, " k"],
) -> Float[Array, "L D"]:
    """`states` with whole tokens taken over: E[p] = F_m[p] (supplement).

    Several partners F_m are ours; the supplement has one.

    Args:
      states: E, text states of the source's prompt.
      partners: F_m, text states of the partners' prompts.
      positions: token positions, distinct; those outside [1, L) stand for none, so that
        BOS is never touched.
      donors: m in [0, M), the partner behind each position.

    Returns:
      the mixed states; with no positions, `states` itself.
    """
    length = states.shape[0]
    positions = jnp.where(positions > 0, positions, length)
    taken = partners[donors, jnp.minimum(positions, length - 1)]
    return states.at[positions].set(taken, mode="drop")


def fine_mix(
    states: Float[Array, "L D"],
    partners: Float[Array, "M L D"],
    dims: Int[Array, "L d"],
    donors: Int[Array, " d"],
) -> Float[Array, "L D"]:
    """`states` with a few dims of its tokens taken over: E[l, j] = F_m[l, j].

    The supplement replaces fewer than 10 of 768. Whether every token gives up the same
    dims is the caller's choice: row l of `dims` belongs to token l.

    Args:
      states: E, text states of the source's prompt.
      partners: F_m, text states of the partners' prompts.
      dims: those taken over at each token, distinct; those outside [0, D) stand for
        none. Row 0, BOS, always stands for none.
      donors: m in [0, M), the partner behind each column of `dims`.

    Returns:
      the mixed states; with no dims, `states` itself.
    """
    length, width = states.shape
    tokens = jnp.arange(length)[:, None]
    dims = jnp.where((tokens > 0) & (dims >= 0), dims, width)
    taken = partners[donors[None], tokens, jnp.minimum(dims, width - 1)]
    return states.at[tokens, dims].set(taken, mode="drop")


def mix(
    states: Float[Array, "L D"],
    partners: Float[Array, "M L D"],
    positions: Int[Array, " k"],
    donors: Int[Array, " k"],
    dims: Int[Array, "L d"],
    dim_donors: Int[Array, " d"],
) -> Float[Array, "L D"]:
    """Both operations of a recipe for one image, fine after coarse; vmap it."""
    mixed = coarse_mix(states, partners, positions, donors)
    return fine_mix(mixed, partners, dims, dim_donors)


@dataclasses.dataclass(frozen=True)
class Widths:
    """How much room the arrays of a batch have: the most of any recipe of a run.

    Taken over the whole file, so that every batch has the same shapes.
    """

    positions: int
    dims: int
    partners: int


def widths_of(recipes: Sequence[Mapping]) -> Widths:
    """The widths that `as_arrays` needs for any batch of these recipes."""
    return Widths(
        positions=max((len(r["positions"]) for r in recipes), default=0),
        dims=max((len(r["dim_donors"]) for r in recipes), default=0),
        partners=max((len(r["partners"]) for r in recipes), default=1),
    )


def as_arrays(
    recipes: Sequence[Mapping],
    row_of: Mapping[str, int],
    *,
    length: int,
    width: int,
    widths: Widths,
) -> dict[str, np.ndarray]:
    """Recipes as the padded arrays of a batch; the last four are `mix`'s arguments.

    Args:
      recipes: B rows of `recipes.jsonl`.
      row_of: id of an image -> its row in the cache.
      length: L, tokens of a text state.
      width: D, dims of a text state.
      widths: k, d and M of the arrays.

    Returns:
      `index`, `noise_seed`, `source` int32 [B], the last a row of the cache; `partners`
      int32 [B, M] likewise, filled up with the first; `text_scale`, `image_scale`
      float32 [B]; `positions`, `donors` int32 [B, k], filled up with L and 0; `dims`
      int32 [B, L, d], filled up with D; `dim_donors` int32 [B, d], with 0.
    """
    count = len(recipes)
    arrays = {
        name: np.asarray([recipe[name] for recipe in recipes], dtype)
        for name, dtype in (
            *(("index", np.int32), ("noise_seed", np.int32)),
            *(("text_scale", np.float32), ("image_scale", np.float32)),
        )
    }
    arrays["source"] = np.asarray([row_of[r["source"]] for r in recipes], np.int32)
    partners = np.empty((count, widths.partners), np.int32)
    positions = np.full((count, widths.positions), length, np.int32)
    donors = np.zeros((count, widths.positions), np.int32)
    dims = np.full((count, length, widths.dims), width, np.int32)
    dim_donors = np.zeros((count, widths.dims), np.int32)
    for i, recipe in enumerate(recipes):
        rows = [row_of[id_] for id_ in recipe["partners"]]
        partners[i] = rows[0]
        partners[i, : len(rows)] = rows
        taken = len(recipe["positions"])
        positions[i, :taken] = recipe["positions"]
        donors[i, :taken] = recipe["donors"]
        if recipe["dims"]:  # one row, for every token alike, or one for each
            start, stop = recipe["dim_tokens"]
            columns = len(recipe["dim_donors"])
            dims[i, start:stop, :columns] = recipe["dims"]
            dim_donors[i, :columns] = recipe["dim_donors"]
    arrays |= {"partners": partners, "positions": positions, "donors": donors}
    return arrays | {"dims": dims, "dim_donors": dim_donors}
