"""The conditionings: for each set of synthetic images, what the UNet is given.

All sets are drawn from the same recipes and noise by one compiled program: they differ
in text states, in whether the source's latents are given, and in the model. A new set
is a row of `CONDITIONINGS`, and perhaps a function in `text_states.py`.
"""

import dataclasses

from mvc_jax.errors import UserError
from mvc_jax.mixing.recipes import NO_MIXING


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What the UNet is given for the images of a set.

    Attributes:
      about: a sentence for the dataset card.
      text: how the text states are computed, a key of `text_states.TEXT_STATES`.
      source: whether the source's latents are given; otherwise zeros are.
      finetuned: whether the fine-tuned model is used; otherwise the base model is.
      partners: number of the recipe's partners that are used; None: the whole recipe
        is.
      needs: what the base must come with: `"image_tower"`, `"controlnet"` (which also
        takes part in sampling), or `""`.
    """

    about: str
    text: str
    source: bool = True
    finetuned: bool = True
    partners: int | None = 0
    needs: str = ""

    def applied(self, recipe: dict, name: str) -> dict:
        """The recipe of an image of set `name`, without the fields it does not use."""
        if self.partners is None:
            return recipe
        return {
            **recipe,
            **NO_MIXING,
            "mode": name,
            "partners": recipe["partners"][: self.partners],
            "dim_tokens": [1, 1],
        }


CONDITIONINGS = {
    "mixed": Conditioning(
        "The method: a real image, and its caption mixed with others of its class.",
        text="mixed",
        partners=None,
    ),
    "unmixed": Conditioning(
        "A control: a real image with its own caption, not mixed.", text="caption"
    ),
    "pretrained": Conditioning(
        "A control: the base model without fine-tuning, by captions alone.",
        text="caption",
        source=False,
        finetuned=False,
    ),
    "caption_only": Conditioning(
        "An ablation: the fine-tuned model by captions alone, without a real image.",
        text="caption",
        source=False,
    ),
    "noised": Conditioning(
        "An ablation: a real image with its own caption, whose text states have noise.",
        text="noised",
    ),
    "interpolated": Conditioning(
        "An ablation: a real image, and a mean of its caption and another's.",
        text="interpolated",
        partners=1,
    ),
    "image_embedding": Conditioning(
        "An ablation: the fine-tuned model by the CLIP embedding of a real image, in "
        "the place of a caption.",
        text="image_embedding",
        source=False,
        needs="image_tower",
    ),
    "image_number": Conditioning(
        "An ablation: the fine-tuned model by the class and the number of an image.",
        text="image_number",
        source=False,
    ),
    "embedding_difference": Conditioning(
        "An ablation: a real image, and the difference between its CLIP embedding and "
        "another's in the place of a caption.",
        text="embedding_difference",
        partners=1,
        needs="image_tower",
    ),
    "controlnet": Conditioning(
        "An ablation: the base model without fine-tuning, by captions and the edges of "
        "a real image (ControlNet).",
        text="caption",
        source=False,
        finetuned=False,
        needs="controlnet",
    ),
}


def model_order(name: str) -> tuple[bool, str]:
    """Sort key of sets, by which each model is loaded once."""
    return not CONDITIONINGS[name].finetuned, CONDITIONINGS[name].needs


def parse_names(value: str) -> tuple[str, ...]:
    """Parses `generate.conditioning`: `all`, or names separated by commas.

    Raises:
      UserError: a name is unknown or repeated.
    """
    names = tuple(name.strip() for name in value.split(",")) if value else ()
    if names == ("all",):
        return tuple(CONDITIONINGS)
    if len(names) != len({*names} & {*CONDITIONINGS}):
        raise UserError(
            "config.generate.conditioning",
            wanted=f"all, or some of {', '.join(CONDITIONINGS)}, each once",
            got=repr(value),
            fix="Separate the names by commas.",
        )
    return names
