"""The two families of checkpoints as data: Stable Diffusion (1.x, 2.x), and XL.

What the files of both have in common is in `families.py`. InstructPix2Pix is of the
family of its base. The checks here are of what only XL has: its second text encoder,
what its UNet is given about the image's size, and the models that are made from it.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from mvc_jax.errors import UserError

Config = dict[str, Any]

_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")


@dataclasses.dataclass(frozen=True)
class Family:
    """What the folders of a family hold.

    Attributes:
      name: for people.
      pipelines: classes in its `model_index.json`, for texts alone first.
      edits: the class of a pipeline whose UNet takes source latents.
      classes: component -> PyTorch's classes that Flax computes.
      fixed: component -> option of its JSON file -> the values that it may have, where
        the families differ.
      index: further entries of the `model_index.json` that is written.
    """

    name: str
    pipelines: tuple[str, ...]
    edits: str
    classes: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Mapping[str, tuple]]
    index: Mapping[str, Any]

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The folders of its tokenizers."""
        return tuple(name for name in self.classes if name.startswith("tokenizer"))

    @property
    def components(self) -> tuple[str, ...]:
        """The folders of its weights."""
        return tuple(name for name in self.classes if name not in self.tokenizers)


SD = Family(
    name="Stable Diffusion",
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInstructPix2PixPipeline",
    ),
    edits="StableDiffusionInstructPix2PixPipeline",
    classes={
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": _CLIP_TOKENIZERS,
    },
    fixed={"unet": {"addition_embed_type": (None,)}},
    index={
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    },
)
XL = Family(
    name="Stable Diffusion XL",
    pipelines=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
    ),
    edits="StableDiffusionXLInstructPix2PixPipeline",
    classes=SD.classes
    | {
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": _CLIP_TOKENIZERS,
    },
    fixed={"unet": {"addition_embed_type": ("text_time",)}},
    index={},
)
ALL = (SD, XL)
_SIZES = 6  # height and width before resizing, top and left of the crop, size
_SCHEDULES_OF_FEW_STEPS = ("LCMScheduler", "TCDScheduler")
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_BASE = "Use Stable Diffusion XL's base, as stabilityai/stable-diffusion-xl-base-1.0."
_WHOLE = "Use all parts of the same checkpoint."


def of_pipeline(name: str | None) -> Family | None:
    """The family that has pipelines of this class."""
    return next((family for family in ALL if name in family.pipelines), None)


def of_files(names: Collection[str]) -> Family:
    """The family of a folder by its files, relative to it."""
    parts = {name.partition("/")[0] for name in names}
    return XL if parts & (XL.classes.keys() - SD.classes.keys()) else SD


def check_index(index: Mapping[str, Any], path: str) -> None:
    """Checks the `model_index.json` of a pipeline of XL.

    Raises:
      UserError: it is the refiner, or a CosXL.
    """
    if index.get("requires_aesthetics_score") or _absent(index.get("text_encoder")):
        raise UserError(
            path,
            wanted="the base of Stable Diffusion XL, which draws images from noise",
            got="its refiner, which has one text encoder and only finishes images of "
            "the base",
            fix=_BASE,
        )
    if index.get("is_cosxl_edit"):
        raise UserError(
            path,
            wanted="a Stable Diffusion XL with its own noise",
            got="a CosXL, whose noise is another and whose source latents are scaled",
            fix=_BASE,
        )


def check_schedule(config: Config, path: str) -> None:
    """Checks that a scheduler of XL is not that of a model for few steps.

    Such models (Turbo, Lightning, LCM) were distilled: they draw in one to eight steps,
    without guidance, and training on the noise's full schedule undoes that.

    Raises:
      UserError: it is.
    """
    kind, spacing = config.get("_class_name"), config.get("timestep_spacing")
    few = kind in _SCHEDULES_OF_FEW_STEPS or (kind in _EULER and spacing == "trailing")
    if few:
        raise UserError(
            path,
            wanted="the schedule of a base that draws in many guided steps",
            got=f"a {kind}"
            + (f" with timestep_spacing {spacing!r}" if spacing else "")
            + ", as a model that was distilled to a few steps has (Turbo, Lightning, "
            "LCM)",
            fix=_BASE,
        )


def check_fit(configs: Mapping[str, Config], folder: str) -> None:
    """Checks that the UNet of XL fits the second text encoder.

    Args:
      configs: by component, `completed` and checked.
      folder: of the pipeline, for errors.

    Raises:
      UserError: they do not fit.
    """
    unet, second = configs["unet"], configs["text_encoder_2"]
    lengths = [
        configs[name]["max_position_embeddings"]
        for name in ("text_encoder", "text_encoder_2")
    ]
    if lengths[0] != lengths[1]:
        raise UserError(
            f"{folder}/text_encoder_2",
            wanted=f"max_position_embeddings of {lengths[0]}, the first encoder's",
            got=f"{lengths[1]}",
            fix=_WHOLE,
        )
    each = unet.get("addition_time_embed_dim")
    if type(each) is not int or each < 1:
        raise UserError(
            f"{folder}/unet",
            wanted="addition_time_embed_dim, a whole number above 0",
            got=f"{each!r}",
            fix=_WHOLE,
        )
    given = unet.get("projection_class_embeddings_input_dim")
    wanted = _SIZES * each + second["projection_dim"]
    if given != wanted:
        refiner = given == wanted - each
        raise UserError(
            f"{folder}/unet",
            wanted=f"a projection_class_embeddings_input_dim of {wanted}: {_SIZES} "
            f"numbers about the image's size in {each} dims each, and the second text "
            f"encoder's projection_dim of {second['projection_dim']}",
            got=f"{given!r}" + (", as the refiner has" if refiner else ""),
            fix=_BASE if refiner else _WHOLE,
        )


def _absent(entry: Any) -> bool:
    """Whether an entry of `model_index.json` says that there is no such component."""
    return entry is None or list(entry) == [None, None]
