"""Under which licence what was made from a base model may be published.

Licences are fields of a card's front matter, as `model_card.base_license` reads them.
"""

from collections.abc import Mapping
from typing import Any

from mvc_jax.checkpoints import model_card
from mvc_jax.errors import UserError

# Those that allow changed works to be published, by the hub's names.
FREE = (
    "apache-2.0",
    "mit",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "isc",
    "unlicense",
    "cc0-1.0",
    "cc-by-3.0",
    "cc-by-4.0",
    "cc-by-sa-3.0",
    "cc-by-sa-4.0",
    "cc-by-nc-3.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0",
    "odc-by",
    "odbl",
    "pddl",
)
# Those that do if their restrictions of use are passed on, and their texts.
RESTRICTED = {
    "creativeml-openrail-m": "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
    "openrail++": "https://huggingface.co/stabilityai/stable-diffusion-2/blob/main/LICENSE-MODEL",
    "bigscience-openrail-m": "https://huggingface.co/spaces/bigscience/license",
    "openrail": "https://huggingface.co/blog/open_rail",
}
_NO_CHANGES = "-nd-"  # Creative Commons: only unchanged copies may be shared


def choose(base: Mapping[str, Any], given: str) -> dict[str, Any]:
    """The licence to publish under.

    Args:
      base: the licence of the base.
      given: by the user; "": none. Needed where the base names none, or one that is not
        known here: its terms must be read by somebody.

    Raises:
      UserError: the base's licence forbids it; or is to be passed on, and `given` is
        another; or is not known, and nothing is given.
    """
    known = base != model_card.UNKNOWN
    name = model_card.license_name(base)
    if _NO_CHANGES in f"{name}-":
        raise UserError(
            "the licence of the base",
            wanted="one that allows what was made from the base to be published",
            got=f"{name}, which allows unchanged copies only",
            fix="Ask its owner for a permission, or start from another base.",
        )
    if base["license"] in (*FREE, *RESTRICTED):
        if given and given != base["license"]:
            raise UserError(
                f"--license={given}",
                wanted=f"that of the base, {name}, which is passed on",
                got="another",
                fix="Leave it out.",
            )
        return dict(base)
    if not given or (known and given != name):
        raise UserError(
            f"--license={given}" if given else "--license",
            wanted="the licence of what is published"
            if not known
            else f"{name}, to confirm that these terms of the base allow it",
            got=given or "none",
            fix="Read the terms of the base and of the dataset; if they allow it, add "
            f"e.g. --license={name if known else 'cc-by-4.0'}.",
        )
    if known:
        return dict(base)
    if given in (*FREE, *RESTRICTED) or _NO_CHANGES in f"{given}-":
        return {"license": given}
    return {"license": "other", "license_name": given}


def in_words(license_: Mapping[str, Any]) -> str:
    """What a reader of the card has to know of a licence, as Markdown."""
    name = model_card.license_name(license_)
    link = license_.get("license_link") or RESTRICTED.get(license_["license"])
    named = f"[{name}]({link})" if link and "://" in str(link) else f"`{name}`"
    lines = [f"Published under {named}."]
    if license_["license"] in RESTRICTED:
        lines.append(
            "Its restrictions of use (in Open RAIL-M licences: Attachment A) apply to "
            "you as well. If you share this, or what you make of it, you must pass "
            "them on as terms that bind those who receive it, with a copy of the "
            "licence, and say what you changed."
        )
    return "\n".join(lines)
