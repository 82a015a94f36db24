"""The Inception network of the FID, as the library torch-fidelity runs it.

Heusel et al., arXiv 1706.08500: features are the 2,048 pooled ones of the Inception v3
that TensorFlow published on 2015-12-05, of images resized to 299 pixels as TensorFlow 1
did it. Another network, resizing or set of weights gives other numbers, so the network
and its weights are the library's, and the weights are known by their hash. PyTorch runs
it on the CPU, beside JAX's devices.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Float, UInt8

from mvc_jax import files
from mvc_jax.errors import UserError

FIELD = "config.evaluate.weights"
URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
HASH = "6726825d"  # what the SHA-256 of the published weights begins with
DIMS = 2048


class Inception:
    """The network, ready to embed images.

    Args:
      weights: file of the weights; empty: the published ones, which are downloaded once
        into PyTorch's cache.
      batch: images at once.

    Raises:
      UserError: see `check`; or the download failed.
    """

    dims = DIMS
    text = None

    def __init__(self, weights: epath.PathLike = "", *, batch: int):
        check(weights)
        from torch_fidelity import feature_extractor_inceptionv3 as library

        path = epath.Path(weights) if weights else _download()
        _check_tensors(path)
        self._network = library.FeatureExtractorInceptionV3(
            "inception-v3-compat",
            [str(DIMS)],
            feature_extractor_weights_path=str(path),
        )
        self._batch = batch
        self.published = files.sha256(path).startswith(HASH)
        if not self.published:
            logging.warning(
                "%s: not the published weights of Inception, so the Fréchet distance "
                "is not called FID",
                path,
            )

    def embed(
        self, images: Sequence[UInt8[np.ndarray, "H W 3"]]
    ) -> Float[np.ndarray, "N 2048"]:
        """Features of images in [0, 255], in float32."""
        import torch

        found = [np.zeros((0, DIMS), np.float32)]
        for start in range(0, len(images), self._batch):
            some = np.stack(images[start : start + self._batch]).transpose(0, 3, 1, 2)
            with torch.inference_mode():
                (features,) = self._network(
                    torch.from_numpy(np.ascontiguousarray(some))
                )
            found.append(features.numpy())
        return np.concatenate(found)


def check(weights: epath.PathLike) -> None:
    """Checks that the library is installed and a named file is there.

    Raises:
      UserError: it is not.
    """
    missing = [
        name
        for name in ("torch", "torchvision", "torch_fidelity")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UserError(
            "config.evaluate.features",
            wanted="the library torch-fidelity, for the feature space inception",
            got=f"no {' and no '.join(missing)}",
            fix='Install it by `pip install -c requirements.lock -e ".[inception]"`, '
            "or choose another feature space.",
        )
    if weights and not epath.Path(weights).is_file():
        raise UserError(
            f"{FIELD} {str(weights)!r}",
            wanted="the file of Inception's weights, or nothing",
            got="no file",
            fix=f"Download {URL}, or leave the field empty: it is then downloaded.",
        )


def _download() -> epath.Path:
    """The published weights in PyTorch's cache.

    Raises:
      UserError: they are not there and cannot be downloaded.
    """
    import torch

    path = epath.Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(path), HASH, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise UserError(
                FIELD,
                wanted=f"Inception's weights from {URL}",
                got=f"{type(error).__name__}: {error}",
                fix=f"Download them where there is a network, and set --{FIELD}=FILE.",
            ) from error
    return path


def _check_tensors(path: epath.Path) -> None:
    """Checks, without running code that the file may hold, that it is this network's.

    Raises:
      UserError: it is not.
    """
    import torch

    got = ""
    try:
        tensors: Any = torch.load(str(path), map_location="cpu", weights_only=True)
        head = tensors.get("fc.weight") if isinstance(tensors, dict) else None
        if head is None or tuple(head.shape) != (1008, DIMS):
            got = "other tensors (no fc.weight of 1008 x 2048)"
    except Exception as error:  # whatever a damaged or foreign file raises
        got = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if got:
        raise UserError(
            f"{FIELD} {str(path)!r}",
            wanted="the weights of Inception v3 as torch-fidelity publishes them",
            got=got,
            fix=f"Download {URL} again; torchvision's Inception is another network.",
        )
