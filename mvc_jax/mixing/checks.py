"""Checks of drawn recipes: errors if nothing is mixed, warnings if little is."""

from collections.abc import Mapping, Sequence

from absl import logging

from mvc_jax.errors import UserError
from mvc_jax.mixing.recipes import Drawing

_MAX_NAMES = 5  # of classes in a warning


def require_tokens(
    recipes: Sequence[Mapping], drawing: Drawing, rows: Sequence[Mapping]
) -> None:
    """Warns of recipes with fewer than `drawing.tokens` positions.

    Args:
      recipes: drawn by `drawing`.
      drawing: how.
      rows: of `encode`, one for each training image.

    Raises:
      UserError: all recipes with coarse mixing have fewer.
    """
    counts = [len(r["positions"]) for r in recipes if r["mode"] != "fine"]
    short = sum(count < drawing.tokens for count in counts)
    if short and short == len(counts):
        longest = max(rows, key=lambda row: row["caption_tokens"])
        raise UserError(
            "config.mix.tokens",
            wanted="a number of tokens that at least one image can mix",
            got=f"{drawing.tokens}, but no image can mix more than {max(counts)}: "
            "source and partners must each have as many; the longest caption, of "
            f"{longest['id']} ({longest['prompt']!r}), has {longest['caption_tokens']}",
            fix="Lower it, or allow more positions by --config.mix.class_prompt=True "
            "or --config.mix.positions=all, or use longer captions.",
        )
    if short:
        logging.warning(
            "%d of %d recipes mix fewer than %d tokens (config.mix.tokens), all that "
            "source and partners have in common",
            short,
            len(counts),
            drawing.tokens,
        )


def require_dims(recipes: Sequence[Mapping], drawing: Drawing) -> None:
    """Warns of recipes without dims, as `dims_on` "words" may leave none.

    Args:
      recipes: drawn by `drawing`.
      drawing: how.

    Raises:
      UserError: no recipe with fine mixing has any.
    """
    fine = [r for r in recipes if r["mode"] != "coarse"]
    empty = sum(not r["dims"] for r in fine) if drawing.dims else 0
    if empty and empty == len(fine):
        raise UserError(
            "config.mix.dims_on",
            wanted="tokens whose dims at least one image can mix",
            got=f"{drawing.dims_on!r}, but no source has words in common with its "
            "partners",
            fix="Set --config.mix.dims_on=all, or --config.mix.class_prompt=True.",
        )
    if empty:
        logging.warning(
            "%d of %d recipes mix no dims (config.mix.dims_on=%s): source and partners "
            "have no words in common",
            empty,
            len(fine),
            drawing.dims_on,
        )


def warn_of_few_partners(
    rows: Sequence[Mapping], classes: Mapping[int, Sequence[int]], drawing: Drawing
) -> None:
    """Warns of classes with fewer other images than `drawing.partners`.

    Args:
      rows: of `encode`, one for each training image.
      classes: from `recipes.classes_of`.
      drawing: how recipes are drawn.
    """
    sizes = {rows[m[0]]["class_name"]: len(m) for m in classes.values()}
    if drawing.partner == "any":
        sizes = {"all classes together": len(rows)}
    single = [name for name, size in sizes.items() if size == 1]
    few = [name for name, size in sizes.items() if 1 < size <= drawing.partners]
    if single:
        logging.warning(
            "a single training image, mixed with itself, in: %s", _listed(single)
        )
    if few:
        logging.warning(
            "fewer than %d other images (config.mix.partners), so that all are mixed, "
            "in: %s",
            drawing.partners,
            _listed(few),
        )


def warn_of_other_scales(recipes: Sequence[Mapping], drawing: Drawing) -> None:
    """Warns of a user's recipes whose scales are not those of the config.

    Args:
      recipes: of a file.
      drawing: how they would have been drawn.
    """
    for name in ("text_scale", "image_scale"):
        low, high = getattr(drawing, name)
        other = [r[name] for r in recipes if not low <= r[name] <= high]
        if other:
            logging.warning(
                "config.generate.%s=%g is not used: config.mix.file has its own in "
                "each recipe, from %g to %g",
                name,
                low,
                min(other),
                max(other),
            )


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")
