"""The value of each operation at a level: what the published policies differ in."""

import dataclasses

from mvc_jax.augment import color, operations

SIGNED = operations.GEOMETRIC  # their direction is drawn


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """Values at the highest level; lower levels scale linearly.

    Integers (pixels, degrees, bits, levels of Solarize) are truncated, as in
    AutoAugment's released code.

    Attributes:
      levels: the highest level.
      translate: fraction of the side.
      translate_pixels: maximum translation in pixels.
      shear: pixels per pixel.
      rotate: degrees.
      bits: of Posterize, at level 0 and at the highest level.
      factors: of ImageEnhance, likewise.
      mirrored: whether the second direction of a blend mirrors its factor about 1.
    """

    levels: int
    translate: float
    translate_pixels: float = float("inf")
    shear: float = 0.3
    rotate: float = 30.0
    bits: tuple[int, int] = (8, 4)
    factors: tuple[float, float] = (0.1, 1.9)
    mirrored: bool = False

    def values(
        self, name: str, level: float | int, height: int, width: int
    ) -> tuple[operations.Operation, operations.Operation]:
        """The operation at a level, in its two directions."""
        low, high = self.factors
        first, last = self.bits
        pixels = {"TranslateX": width, "TranslateY": height}.get(name, 0)
        pixels = min(self.translate * pixels, self.translate_pixels)
        value = {
            "ShearX": level * self.shear / self.levels,
            "ShearY": level * self.shear / self.levels,
            "TranslateX": int(level * pixels / self.levels),
            "TranslateY": int(level * pixels / self.levels),
            "Rotate": int(level * self.rotate / self.levels),
            "Solarize": color.LEVELS - int(level * color.LEVELS / self.levels),
            "Posterize": first - int(level * (first - last) / self.levels),
        }.get(name, 0.0)
        if name in operations.BLENDS:
            value = level * (high - low) / self.levels + low
        other = value
        if name in SIGNED:
            other = -value
        elif name in operations.BLENDS and self.mirrored:
            other = 2 - value
        return (name, value), (name, other)
