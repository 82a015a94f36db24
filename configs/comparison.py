"""What the small experiments have in common: sets, runs, and how images are drawn.

Not a config: `digits_splits.py`, `brain_tumor_small.py` and `cifar10_small.py` use it,
so that their tables have the same rows. No setting was chosen on test images; the rows
of `probabilistic` with controls and rivals were added after those of the digits, then
the ones with larger batches of real images, `probabilistic:real`, and those of GIF-SD.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

SETS = (
    "mixed",
    "unmixed",
    "pretrained",
    "real_guidance",
    "da_fusion",
    "diff_mix",
    "gif_sd",
)
REGIMES = ("combined", "two_phase", "probabilistic")


def compare(
    config: ConfigDict,
    policy: str,
    *,
    rows: str = "all",
    sets: Sequence[str] = SETS,
) -> None:
    """Draws sets, and trains on each, with and without a classic policy.

    Args:
      config: to change.
      policy: the best classic one, of `classify.runs`.
      rows: `all` 26, or where a classifier takes minutes `few`, 15, or `fewest`, 9,
        of which eight are on top of the policy.
      sets: those to draw; without the rows of others.
    """
    config.generate.sets = tuple(sets)
    config.generate.strength = (0.25, 0.5, 0.75, 1.0)  # those of DA-Fusion
    config.mix.per_image = 4  # the paper makes 3 to 4
    runs = {
        "all": (
            "real",
            f"real+{policy}",
            *REGIMES,
            "probabilistic:real",
            "combined:unmixed",
            "combined:pretrained",
            *(f"{regime}+{policy}" for regime in REGIMES),
            f"probabilistic:real+{policy}",
            *(f"combined:{name}+{policy}" for name in SETS[1:]),
            *(f"probabilistic:{name}+{policy}" for name in SETS[1:]),
            "synthetic_only",
            "synthetic_only:unmixed",
        ),
        "few": (
            "real",
            f"real+{policy}",
            "combined",
            *(f"{regime}+{policy}" for regime in REGIMES),
            f"probabilistic:real+{policy}",
            *(f"combined:{name}+{policy}" for name in SETS[1:]),
            f"probabilistic:unmixed+{policy}",
            f"probabilistic:real_guidance+{policy}",
        ),
        "fewest": (
            "real",
            f"real+{policy}",
            f"combined+{policy}",
            f"probabilistic+{policy}",
            f"probabilistic:real+{policy}",
            f"combined:unmixed+{policy}",
            f"combined:pretrained+{policy}",
            f"probabilistic:unmixed+{policy}",
            f"probabilistic:real_guidance+{policy}",
        ),
    }[rows]
    not_drawn = {*SETS} - {*sets}
    config.classify.runs = tuple(
        run for run in runs if not_drawn.isdisjoint(run.split("+")[0].split(":"))
    )


def draw_with_few_steps(config: ConfigDict) -> None:
    """20 steps of DPM-Solver++ with the scales of the digits; ours, not measured here.

    The paper's text scale of 7.5 is for Stable Diffusion.
    """
    config.generate.sampler = "dpmpp_2m"
    config.generate.steps = 20
    config.generate.text_scale = 2.0
    config.generate.image_scale = 1.5
    config.generate.batch_size = 50
