"""What a level means to each operation: the one thing published policies differ in."""

import dataclasses

from mvc_jax.augment import color, operations

SIGNED = (*operations.GEOMETRIC,)  # a coin decides the direction


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """Values at the highest level; lower ones lie evenly between none and that.

    Whole numbers (pixels, degrees, bits, levels of Solarize) are cut, as in
    AutoAugment's released code.
    """

    levels: int  # the highest level
    translate: float  # share of the side
    translate_pixels: float = float("inf")  # and at most so many
    shear: float = 0.3
    rotate: float = 30.0  # degrees
    bits: tuple[int, int] = (8, 4)  # of Posterize, at level 0 and at the highest
    factors: tuple[float, float] = (0.1, 1.9)  # of ImageEnhance, likewise
    mirrored: bool = False  # a coin mirrors the factor about 1

    def values(
        self, name: str, level: float | int, height: int, width: int
    ) -> tuple[operations.Operation, operations.Operation]:
        """The operation at a level, for either face of the coin."""
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
