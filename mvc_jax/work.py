"""What a stage has to do, counted before it runs: what its `price` is given and makes.

Nothing here is read, written or computed on a device.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

# Pixels that a device encodes or decodes at once, at least: Stable Diffusion's decoder
# then has 2.7 GiB of activations, its encoder 1.6 (docs/scaling.md).
AUTOENCODER_PIXELS = 4 * 512**2


@dataclasses.dataclass(frozen=True)
class BaseSizes:
    """Sizes of a Stable Diffusion, under the names of `models/stable_diffusion.py`.

    Attributes:
      name: of the model, for people.
      downsampling: image pixels per latent pixel, along one side.
      latent_channels: of the autoencoder.
      context_length: L, tokens of a prompt.
      text_width: D, dims of a text state.
      vae_channels: of the autoencoder's first level.
      unet_channels: of the UNet's first level.
      parameters: component -> number of parameters.
      pooled_width: P, dims of the pooled embedding of a prompt; 0: there is none.
    """

    name: str
    downsampling: int
    latent_channels: int
    context_length: int
    text_width: int
    vae_channels: int
    unet_channels: int
    parameters: Mapping[str, int]
    pooled_width: int = 0

    @property
    def speed(self) -> dict[str, Any]:
        """On what of it the time of a step depends.

        Not on the text encoder's parameters: how many tokens a new tokenizer gets is
        not known before it is trained.
        """
        networks = {name: self.parameters[name] for name in ("unet", "vae")}
        fields = dataclasses.asdict(self) | {"parameters": networks}
        unused = {"name"} if self.pooled_width else {"name", "pooled_width"}
        return {key: value for key, value in fields.items() if key not in unused}

    def text_numbers(self) -> int:
        """Numbers of a prompt's text states and pooled embedding."""
        return self.context_length * self.text_width + self.pooled_width

    def moments_shape(self, size: int) -> tuple[int, int, int]:
        """Shape of the moments of an image of `size` pixels a side."""
        side = size // self.downsampling
        return side, side, 2 * self.latent_channels

    def unet_bytes(self, size: int, *, remat: str | None = None) -> int:
        """Bytes that the UNet's activations take for one image, at least.

        Of Stable Diffusion 1.5 they are ten times as many (docs/scaling.md).

        Args:
          size: of the image, in pixels a side.
          remat: of the training step; None: the UNet is not trained.
        """
        tensors = {None: 4, "none": 32, "blocks": 4, "full": 4}[remat]
        # Of the first level, in bfloat16.
        return tensors * 2 * (size // self.downsampling) ** 2 * self.unet_channels


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much there is to work on, found when it is first asked for.

    Attributes:
      find_images: finds the images of each class of `pool`, `train` and `test`.
      find_recipes: number of training images -> number of recipes.
      find_base: finds the sizes of the base.
      one_prompt_per_class: whether all captions of a class are the same.
    """

    find_images: Callable[[], Mapping[str, tuple[int, ...]]]
    find_recipes: Callable[[int], int]
    find_base: Callable[[], BaseSizes]
    one_prompt_per_class: bool

    @functools.cached_property
    def by_class(self) -> Mapping[str, tuple[int, ...]]:
        """Images of each class by split."""
        return self.find_images()

    @property
    def pool(self) -> int:
        """Images of the base pool."""
        return sum(self.by_class["pool"])

    @property
    def train(self) -> tuple[int, ...]:
        """Training images of each class."""
        return self.by_class["train"]

    @property
    def images(self) -> int:
        """Training images."""
        return sum(self.train)

    @property
    def test(self) -> int:
        """Test images."""
        return sum(self.by_class["test"])

    @property
    def prompts(self) -> tuple[int, int]:
        """The smallest and the largest number of distinct prompts, with the empty."""
        classes = len(self.train)
        return classes + 1, 1 + (classes if self.one_prompt_per_class else self.images)

    @functools.cached_property
    def recipes(self) -> int:
        """Synthetic images of a set."""
        return self.find_recipes(self.images)

    @functools.cached_property
    def base(self) -> BaseSizes:
        """The model to start from."""
        return self.find_base()


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage would make if it started now, and what that takes.

    Attributes:
      makes: what -> how many of it.
      unit: the item of `makes` to which the time is proportional; "": none is.
      speed: settings on which the time of such an item depends.
      on_devices: whether the time depends on the accelerators too.
      disk: what -> bytes, at most.
      asks: bytes that must be free when the stage starts, at least; None: all `disk`.
      leaves: bytes that it has written at its end, at least; None: all `disk`.
      host: what -> bytes of the host's memory at one time, at least.
      devices: what -> bytes of the memory of all devices at one time, at least.
      lower: fields of the config that can be lowered where memory is too small.
      remark: what else should be known before it starts; "": nothing.
    """

    makes: dict[str, int]
    unit: str = ""
    speed: dict[str, Any] = dataclasses.field(default_factory=dict)
    on_devices: bool = False
    disk: dict[str, int] = dataclasses.field(default_factory=dict)
    asks: int | None = None
    leaves: int | None = None
    host: dict[str, int] = dataclasses.field(default_factory=dict)
    devices: dict[str, int] = dataclasses.field(default_factory=dict)
    lower: tuple[str, ...] = ()
    remark: str = ""

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())
