"""AutoAugment (Cubuk et al., arXiv 1805.09501): the policies of its appendix.

Each image draws one of 25 sub-policies: two operations, each with a probability and a
level from 0 to 9 on a scale that ends at 10.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Key, UInt8

from mvc_jax.augment import magnitudes, operations

# Operation, probability, level; one sub-policy per line. Table 7.
CIFAR10 = """
Invert 0.1 7 Contrast 0.2 6
Rotate 0.7 2 TranslateX 0.3 9
Sharpness 0.8 1 Sharpness 0.9 3
ShearY 0.5 8 TranslateY 0.7 9
AutoContrast 0.5 8 Equalize 0.9 2
ShearY 0.2 7 Posterize 0.3 7
Color 0.4 3 Brightness 0.6 7
Sharpness 0.3 9 Brightness 0.7 9
Equalize 0.6 5 Equalize 0.5 1
Contrast 0.6 7 Sharpness 0.6 5
Color 0.7 7 TranslateX 0.5 8
Equalize 0.3 7 AutoContrast 0.4 8
TranslateY 0.4 3 Sharpness 0.2 6
Brightness 0.9 6 Color 0.2 8
Solarize 0.5 2 Invert 0.0 3
Equalize 0.2 0 AutoContrast 0.6 0
Equalize 0.2 8 Equalize 0.6 4
Color 0.9 9 Equalize 0.6 6
AutoContrast 0.8 4 Solarize 0.2 8
Brightness 0.1 3 Color 0.7 0
Solarize 0.4 5 AutoContrast 0.9 3
TranslateY 0.9 9 TranslateY 0.7 9
AutoContrast 0.9 2 Solarize 0.8 3
Equalize 0.8 8 Invert 0.1 3
TranslateY 0.7 9 AutoContrast 0.9 1
"""
# Table 8.
SVHN = """
ShearX 0.9 4 Invert 0.2 3
ShearY 0.9 8 Invert 0.7 5
Equalize 0.6 5 Solarize 0.6 6
Invert 0.9 3 Equalize 0.6 3
Equalize 0.6 1 Rotate 0.9 3
ShearX 0.9 4 AutoContrast 0.8 3
ShearY 0.9 8 Invert 0.4 5
ShearY 0.9 5 Solarize 0.2 6
Invert 0.9 6 AutoContrast 0.8 1
Equalize 0.6 3 Rotate 0.9 3
ShearX 0.9 4 Solarize 0.3 3
ShearY 0.8 8 Invert 0.7 4
Equalize 0.9 5 TranslateY 0.6 6
Invert 0.9 4 Equalize 0.6 7
Contrast 0.3 3 Rotate 0.8 4
Invert 0.8 5 TranslateY 0.0 2
ShearY 0.7 6 Solarize 0.4 8
Invert 0.6 4 Rotate 0.8 4
ShearY 0.3 7 TranslateX 0.9 3
ShearX 0.1 6 Invert 0.6 5
Solarize 0.7 2 TranslateY 0.6 7
ShearY 0.8 4 Invert 0.8 8
ShearX 0.7 9 TranslateY 0.8 3
ShearY 0.8 5 AutoContrast 0.7 3
ShearX 0.7 2 Invert 0.1 5
"""
# Table 9.
IMAGENET = """
Posterize 0.4 8 Rotate 0.6 9
Solarize 0.6 5 AutoContrast 0.6 5
Equalize 0.8 8 Equalize 0.6 3
Posterize 0.6 7 Posterize 0.6 6
Equalize 0.4 7 Solarize 0.2 4
Equalize 0.4 4 Rotate 0.8 8
Solarize 0.6 3 Equalize 0.6 7
Posterize 0.8 5 Equalize 1.0 2
Rotate 0.2 3 Solarize 0.6 8
Equalize 0.6 8 Posterize 0.4 6
Rotate 0.8 8 Color 0.4 0
Rotate 0.4 9 Equalize 0.6 2
Equalize 0.0 7 Equalize 0.8 8
Invert 0.6 4 Equalize 1.0 8
Color 0.6 4 Contrast 1.0 8
Rotate 0.8 8 Color 1.0 2
Color 0.8 8 Solarize 0.8 7
Sharpness 0.4 7 Invert 0.6 8
ShearX 0.6 5 Equalize 1.0 9
Color 0.4 0 Equalize 0.6 3
Equalize 0.4 7 Solarize 0.2 4
Solarize 0.6 5 AutoContrast 0.6 5
Invert 0.6 4 Equalize 1.0 8
Color 0.6 4 Contrast 1.0 8
Equalize 0.8 8 Equalize 0.6 3
"""
# The released code (tensorflow/models, research/autoaugment) translates by up to 10 of
# 32 pixels, and its Posterize keeps 4 bits at level 0 and fewer above. The paper's
# Table 6 has 150 of ImageNet's 331 pixels, and 8 to 4 bits.
RELEASED = magnitudes.Magnitudes(levels=10, translate=10 / 32, bits=(4, 0))
PAPER = magnitudes.Magnitudes(levels=10, translate=150 / 331)
POLICIES = {
    "cifar10": (CIFAR10, RELEASED),
    "imagenet": (IMAGENET, PAPER),
    "svhn": (SVHN, RELEASED),
}
SubPolicies = tuple[tuple[tuple[str, float, float], ...], ...]


def parse(text: str) -> SubPolicies:
    """Parses lines of `operation probability level ...` into triples, line by line."""
    policies = []
    for line in text.split("\n"):
        words = line.split()
        if words:
            triples = zip(words[::3], words[1::3], words[2::3], strict=True)
            policies.append(
                tuple((name, float(p), float(level)) for name, p, level in triples)
            )
    return tuple(policies)


@functools.lru_cache
def _tables(policy: str, height: int, width: int, resampling: str):
    text, scale = POLICIES[policy]
    policies = parse(text)
    rows = [
        value
        for steps in policies
        for name, _, level in steps
        for value in scale.values(name, level, height, width)
    ]
    chances = np.array([[p for _, p, _ in steps] for steps in policies], np.float32)
    return operations.table(rows, height, width, resampling), chances


def autoaugment(
    key: Key[Array, ""],
    image: UInt8[Array, "H W C"],
    *,
    policy: str,
    fill: int = 128,
    resampling: str = "nearest",
) -> UInt8[Array, "H W C"]:
    """Applies to one image a sub-policy drawn from 25.

    Args:
      key: of this image.
      image: in [0, 255].
      policy: a key of `POLICIES`.
      fill: level of pixels from outside the image; the released code's is the mean.
      resampling: "nearest", as in the released code, or "bilinear".

    Raises:
      ValueError: the policy is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r}; known: {', '.join(POLICIES)}")
    height, width, _ = image.shape
    table, chances = _tables(policy, height, width, resampling)
    drawn, where = draw(key, jnp.asarray(chances))
    return operations.perform(
        table,
        drawn,
        where,
        image,
        fill=fill,
        paint=(125, 122, 113),
        resampling=resampling,
    )


def draw(
    key: Key[Array, ""], chances: Float32[Array, "P S"]
) -> tuple[Int32[Array, " S"], Float32[Array, "S 2"]]:
    """Draws a sub-policy, which of its steps are applied, and their directions.

    Args:
      key: of this image.
      chances: probability that step j of sub-policy i is applied.

    Returns:
      for each step its row of the table, and a position in [0, 1)^2. Row 0 skips the
      step; row 1 + 2 (i S + j) + k applies it in direction k, 0 or 1.
    """
    policies, steps = chances.shape
    choice_key, step_key = jax.random.split(key)
    choice = jax.random.randint(choice_key, (), 0, policies)
    draws = jax.random.uniform(step_key, (steps, 4))
    direction = (draws[:, 1] < 0.5).astype(jnp.int32)
    rows = 1 + 2 * (choice * steps + jnp.arange(steps)) + direction
    return jnp.where(draws[:, 0] < chances[choice], rows, 0), draws[:, 2:]
