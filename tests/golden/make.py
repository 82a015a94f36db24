"""Writes the golden files in this folder: PyTorch's outputs for tiny checkpoints.

    python tests/golden/make.py

Needs PyTorch (the extra `torch`). Checkpoints and inputs are drawn from their names by
`tests/sd_families.py`, the comparisons are those of `tests/sd_parity.py`; the files
hold outputs only, and every seventh number of large arrays.
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch  # noqa: F401  # first: ours hides what is not imported yet from libraries

TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # this checkout's, not an installed one

import sd_families  # noqa: E402
import sd_parity  # noqa: E402


def main() -> None:
    for family in sd_families.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            sd_parity.write_folders(family, pathlib.Path(folder))
            pipelines = sd_parity.Pipelines(pathlib.Path(folder))
            computed = sd_parity.compute_torch(family, pipelines)
        arrays = {
            f"{name}/{key}": array
            for name, found in computed.items()
            for key, array in sd_parity.thin(found).items()
        }
        np.savez_compressed(sd_parity.GOLDEN / f"{family}.npz", **arrays)
        print(f"{family}.npz: {len(arrays)} arrays")


if __name__ == "__main__":
    main()
