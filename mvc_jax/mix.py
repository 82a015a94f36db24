"""Captions, labels -> mixing recipes; and the pure operations that apply them.

Reads: `encode/prompts.jsonl`. Writes: `recipes.jsonl`, one row for each synthetic
image. Row k depends on (seed, k) alone: raising `mix.per_image` appends.
"""

import bisect

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mvc_jax import files
from mvc_jax.data import manifest, order, shards
from mvc_jax.errors import require

MODES = ("coarse", "fine")
POSITIONS = ("caption", "words", "all")


def check(config: ConfigDict) -> None:
    """Checks the section `mix`."""
    section = config.mix
    require(
        section.per_image > 0,
        "config.mix.per_image",
        wanted="at least 1",
        got=section.per_image,
        fix="The paper makes 3 to 4.",
    )
    require(
        len(section.modes) > 0 and set(section.modes) <= set(MODES),
        "config.mix.modes",
        wanted=f"some of {', '.join(MODES)}",
        got=tuple(section.modes),
        fix="Name these.",
    )
    require(
        section.positions in POSITIONS,
        "config.mix.positions",
        wanted=f"one of {', '.join(POSITIONS)}",
        got=repr(section.positions),
        fix="Name one of these.",
    )
    if not config.base.path:
        _check_dims(section.dims, config.pretrain.text.width)
    for field in ("tokens", "dims"):
        require(
            section[field] >= 0,
            f"config.mix.{field}",
            wanted="at least 0",
            got=section[field],
            fix="Raise it.",
        )


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Draws a recipe for every synthetic image."""
    workdir = epath.Path(workdir)
    settings = {"seed": config.seed, "mix": config.mix.to_dict()}
    stage = manifest.open_stage(workdir, "mix", settings, inputs=("encode",))
    if stage.complete:
        return
    rows = files.read_jsonl(workdir / "encode" / "prompts.jsonl")
    shape = shards.Shards(workdir / "encode" / "text_states").shape
    settings = config.mix
    _check_dims(settings.dims, shape[2])
    classes: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        classes.setdefault(row["label"], []).append(i)
    recipes = [
        make_recipe(
            k,
            rows,
            classes,
            seed=config.seed,
            modes=tuple(settings.modes),
            tokens=settings.tokens,
            positions=settings.positions,
            dims=settings.dims,
            length=shape[1],
            width=shape[2],
        )
        for k in range(settings.per_image * len(rows))
    ]
    files.write_jsonl(stage.folder / "recipes.jsonl", recipes)
    logging.info("%d recipes", len(recipes))
    stage.finish(["recipes.jsonl"], recipes=len(recipes))


def _check_dims(dims: int, width: int) -> None:
    require(
        dims <= width,
        "config.mix.dims",
        wanted=f"at most the {width} dims of a text state",
        got=dims,
        fix="The paper replaces fewer than 10 of 768.",
    )


def make_recipe(
    k: int,
    rows: list[dict],
    classes: dict[int, list[int]],
    *,
    seed: int,
    modes: tuple[str, ...],
    tokens: int,
    positions: str,
    dims: int,
    length: int,
    width: int,
) -> dict:
    """The recipe of synthetic image `k`, a function of (seed, k).

    Every training image is the source once a round, and the modes take turns by round.
    The partner is another image of the class (itself, where there is no other).

    Args:
      k: index of the synthetic image.
      rows: of `encode`, one a training image.
      classes: label -> ascending indices into `rows`.
      seed: of the run.
      modes: some of `MODES`.
      tokens: how many positions coarse mixing takes over, at most those allowed.
      positions: which are allowed: the `caption`'s words; all `words`, the class
        prompt's too; or `all` up to the last padding. Never BOS.
      dims: how many text dims fine mixing takes over.
      length: L, tokens of a text state.
      width: D, dims of a text state.

    Returns:
      `{"index", "source", "partner", "label", "mode", "positions", "dims"}`.
    """
    rng = order.generator(seed, "mix", k)
    round_, source = divmod(k, len(rows))
    row = rows[source]
    members = classes[row["label"]]
    shift = 1 + rng.integers(max(len(members) - 1, 1))  # of 1 member: back to itself
    here = bisect.bisect_left(members, source)
    partner = rows[members[(here + shift) % len(members)]]
    mode = modes[round_ % len(modes)]
    words = max(row["caption_tokens"], partner["caption_tokens"])
    start, stop = {
        "caption": (row["caption_start"], row["caption_start"] + words),
        "words": (1, max(row["tokens"], partner["tokens"]) - 1),
        "all": (1, length),
    }[positions]
    recipe = {"index": k, "source": row["id"], "partner": partner["id"]}
    recipe |= {"label": row["class_name"], "mode": mode, "positions": [], "dims": []}
    if mode == "coarse":
        allowed = np.arange(start, min(stop, length))
        count = min(tokens, len(allowed))
        chosen = rng.choice(allowed, size=count, replace=False)
        recipe["positions"] = sorted(chosen.tolist())
    else:
        chosen = rng.choice(width, size=dims, replace=False)
        recipe["dims"] = sorted(chosen.tolist())
    return recipe


def coarse_mix(
    states: Float[Array, "L D"],
    partner: Float[Array, "L D"],
    positions: Int[Array, " k"],
) -> Float[Array, "L D"]:
    """`states` with whole tokens taken from `partner`: E[pos] = F[pos] (supplement).

    Args:
      states: E, text states of the source's prompt.
      partner: F, text states of the partner's.
      positions: token positions in [1, L); entries of L or more stand for none.

    Returns:
      the mixed states; with no positions, `states` itself.
    """
    return states.at[positions].set(partner[positions], mode="drop")


def fine_mix(
    states: Float[Array, "L D"],
    partner: Float[Array, "L D"],
    dims: Int[Array, " d"],
) -> Float[Array, "L D"]:
    """`states` with a few dims taken from `partner`: E[:, dims] = F[:, dims].

    The supplement replaces fewer than 10 of 768; the same dims for every token but BOS
    (whose state is the same for every prompt) is our choice.

    Args:
      states: E, text states of the source's prompt.
      partner: F, text states of the partner's.
      dims: in [0, D); entries of D or more stand for none.
    """
    return states.at[1:, dims].set(partner[1:, dims], mode="drop")


def pad_indices(
    lists: list[list[int]], width: int, none: int
) -> Int[np.ndarray, "N width"]:
    """Ragged lists of positions or dims as one array, filled up with `none`."""
    array = np.full((len(lists), width), none, np.int32)
    for row, values in zip(array, lists, strict=True):
        row[: len(values)] = values
    return array


def mix(states: Array, partner: Array, positions: Array, dims: Array) -> Array:
    """Both operations of a recipe, for one image; vmap it over a batch."""
    return fine_mix(coarse_mix(states, partner, positions), partner, dims)
