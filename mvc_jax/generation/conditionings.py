"""The conditionings: for each set of synthetic images, what the UNet is given.

All sets are drawn from the same recipes and noise by one compiled program: they differ
in text states, in whether the source's latents are given, and in the model. A new set
is a row of `CONDITIONINGS`, and perhaps a function in `text_states.py`. Sets that start
from the noised source, other papers' methods, have a program for each strength.
"""

import dataclasses

from mvc_jax.errors import UserError
from mvc_jax.generation.edits import Edits
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
      edits: whether images start from the noised source (`generation/edits.py`).
      perturbed: whether the sampled latents are changed before they are decoded.
      towards: whether their prompt is that of an image of another class, so that they
        have soft labels.
    """

    about: str
    text: str
    source: bool = True
    finetuned: bool = True
    partners: int | None = 0
    needs: str = ""
    edits: bool = False
    perturbed: bool = False
    towards: bool = False

    def applied(self, recipe: dict, name: str, edits: Edits | None = None) -> dict:
        """The recipe of an image of set `name`, without the fields it does not use.

        Args:
          recipe: one of `recipes.jsonl`.
          name: of the set.
          edits: completes it, if the set starts from its sources; None: it is not.
        """
        if self.partners is None:
            return recipe
        applied = {
            **recipe,
            **NO_MIXING,
            "mode": name,
            "partners": recipe["partners"][: self.partners],
            "dim_tokens": [1, 1],
        }
        applied.pop("pooled", None)
        if self.edits and edits is not None:
            return edits.completed(applied, towards=self.towards)
        return applied


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
    "real_guidance": Conditioning(
        "A rival: a real image, noised and drawn to its end by the base model without "
        "fine-tuning, by its caption (He et al., arXiv 2210.07574).",
        text="caption",
        source=False,
        finetuned=False,
        edits=True,
    ),
    "gif_sd": Conditioning(
        "A rival: as Real Guidance; then each channel of the latents is scaled and "
        "shifted at random (GIF-SD, Zhang et al., arXiv 2211.13976, without its "
        "guidance by CLIP).",
        text="caption",
        source=False,
        finetuned=False,
        edits=True,
        perturbed=True,
    ),
    "da_fusion": Conditioning(
        "A rival: a real image, noised and drawn to its end by the fine-tuned model, "
        "by its caption (DA-Fusion, Trabucco et al., arXiv 2302.07944, without its "
        "textual inversion).",
        text="caption",
        source=False,
        edits=True,
    ),
    "diff_mix": Conditioning(
        "A rival: a real image, noised and drawn to its end by the fine-tuned model, "
        "by the prompt of an image of another class; its label is soft (Diff-Mix, Wang "
        "et al., arXiv 2403.19600, without its textual inversion).",
        text="target",
        source=False,
        edits=True,
        towards=True,
    ),
}
RIVALS = tuple(name for name, found in CONDITIONINGS.items() if found.edits)


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
