"""Digits, several splits: the method, its controls and its rivals in one table.

    mvc-jax repeat --seeds=0,1,2,3,4 --config=configs/digits_splits.py \
      --workdir=runs/digits_splits

`digits.py` with every set of `comparison.py`, the filter of classifiers by folds left
off, and the policy `affine`, since a mirrored digit is not a digit. The base knows the
domain: its pool is of the same digits. Mixing by its level, and images per real one:

    mvc-jax sweep --config=configs/digits_splits.py --workdir=runs/digits_tokens \
      --vary=mix.tokens=1,4 --vary=mix.dims=2,8,32
    mvc-jax sweep --config=configs/digits_splits.py --workdir=runs/digits_ratio \
      --vary=classify.ratio=1,2,4

On three splits no level differs by more than 0.6 points.

Five splits, 2026-11-29, two CPU cores shared with other work: 32 minutes. Real only
83.6 %, combined 85.0, probabilistic 86.6; with affine augmentation 91.3, 88.7 and 92.2,
and with as many real images added 92.7; `docs/results.md` has all.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import common, comparison, digits


def get_config(argument: str = "") -> ConfigDict:
    given = common.parse_argument(argument, known=("preset",))
    config = digits.get_config()
    comparison.compare(config, "affine")
    config.report.title = "Mixing Visual Concepts: digits, and its rivals"
    return common.apply_preset(config, given)
