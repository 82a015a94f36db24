"""The card of an exported classifier: README.md, with the lines that load it.

timm's transforms resize almost as this program does; the lines for Pillow are exact.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mvc_jax.checkpoints.model_card import code, table

CROP_MODES = {"stretch": "squash", "crop": "center", "pad": "border"}  # timm's
FILL = (0, 0, 0)  # of padding, in [0, 255]
_INTERPOLATIONS = {"lanczos": "lanczos", "area": "box"}  # timm's
_PILLOW = {"lanczos": "LANCZOS", "area": "BOX"}
_RESIZE = {
    "stretch": "image.resize(({0}, {0}), Image.Resampling.{1})",
    "crop": "ImageOps.fit(image, ({0}, {0}), Image.Resampling.{1})",
    "pad": "ImageOps.pad(image, ({0}, {0}), Image.Resampling.{1})",
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the network sees it, in this order.

    Attributes:
      resize: how it becomes square, a key of `CROP_MODES`.
      resample: `lanczos` or `area`, to `data_size`.
      data_size: side in pixels.
      size: of the network's input; if it is another, reached by `area`.
      mean, std: per channel, of pixels in [0, 1].
    """

    resize: str
    resample: str
    data_size: int
    size: int
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def interpolation(self) -> str:
        """timm's nearest; to Lanczos followed by area, that is bicubic."""
        if self.resample == "lanczos" and self.data_size != self.size:
            return "bicubic"
        return _INTERPOLATIONS[self.resample]

    def for_config(self) -> dict[str, Any]:
        """What timm's fields do not say."""
        said = {
            name: getattr(self, name) for name in ("resize", "resample", "data_size")
        }
        return said | ({"fill": list(FILL)} if self.resize == "pad" else {})


def text(config: Mapping[str, Any], done: Preprocessing, *, in_timm: bool) -> str:
    """The card: YAML front matter, then Markdown.

    Args:
      config: the content of `config.json`.
      done: to the images.
      in_timm: whether timm has the architecture.
    """
    front: dict[str, Any] = {
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "mvc_jax", *["timm"] * in_timm],
    }
    if in_timm:
        front["library_name"] = "timm"
    rows = {
        "architecture": config["architecture"],
        "classes": len(config["label_names"]),
        "input": f"{done.size} x {done.size} pixels, RGB",
        "mean": ", ".join(f"{x:g}" for x in done.mean),
        "standard deviation": ", ".join(f"{x:g}" for x in done.std),
    }
    sections = [
        f"# {config['architecture']}\n\nTrained by `mvc_jax` to compare training sets.",
        table(rows).rstrip(),
        "Classes: " + ", ".join(map(code, config["label_names"])),
        _loading(done) if in_timm else _OURS,
        _exact(done),
    ]
    header = yaml.safe_dump(front, sort_keys=False)
    return f"---\n{header}---\n\n" + "\n\n".join(sections) + "\n"


_OURS = """\
## Load it

timm does not have this network. `mvc_jax` takes the folder as
`--config.classify.pretrained`."""

_TIMM = """\
import timm
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
names = model.pretrained_cfg["label_names"]
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
{fill}image = Image.open("image.png").convert("RGB")
probabilities = model(transform(image)[None]).softmax(-1)[0]
"""


def _loading(done: Preprocessing) -> str:
    fill, why = "", ""
    if done.resize == "pad":
        fill = f"transform.transforms[1].fill = {FILL}  # black, not the mean colour\n"
        why = (
            " timm pads with the mean colour; in training it was black, which the line "
            "with `fill` sets."
        )
    lines = _TIMM.format(fill=fill)
    return f"## Load it in timm\n\nRun it in this folder.{why}\n\n```python\n{lines}```"


def _exact(done: Preprocessing) -> str:
    first = _RESIZE[done.resize].format(done.data_size, _PILLOW[done.resample])
    lines = [
        "import numpy as np",
        "from PIL import Image, ImageOps",
        "",
        'image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")',
        f"image = {first}",
    ]
    if done.size != done.data_size:
        second = _RESIZE["stretch"].format(done.size, _PILLOW["area"])
        lines.append(f"image = {second}")
    lines += [
        f"mean, std = np.float32({list(done.mean)}), np.float32({list(done.std)})",
        "pixels = (np.asarray(image, np.float32) / 255 - mean) / std",
        "pixels = pixels.transpose(2, 0, 1)[None]  # [1, 3, H, W]",
    ]
    body = "\n".join(lines)
    return (
        "## Preprocessing\n\nAs in training, to the pixel. Transparent images were put "
        "on white, and those of more than 8 bits scaled to 8.\n\n"
        f"```python\n{body}\n```"
    )
