"""NVIDIA's libraries, which JAX and PyTorch share: what is installed, what is loaded.

They come as packages of Python, and one library's packages for two versions of CUDA own
the same files: whichever was unpacked last serves both. Names end in the version
(`nvidia-cudnn-cu12`); from CUDA 13 on some have no ending (`nvidia-cublas`).
"""

import collections
import contextlib
import ctypes
import os
import pathlib
import re
import sys
from collections.abc import Iterable

_CUDNN = "libcudnn.so.9"
_NAME = re.compile(r"(nvidia-[a-z0-9-]+?)(-cu\d+)?")


def installed() -> list[str]:
    """Names of the packages of NVIDIA that Python would find; reads no file."""
    return [name for name in _packages() if name.startswith("nvidia-")]


def for_two_versions(names: Iterable[str]) -> dict[str, list[str]]:
    """Library -> its packages, where these are for more than one version of CUDA.

    Args:
      names: of packages, as on PyPI; others than NVIDIA's count for nothing.
    """
    packages = collections.defaultdict(set)
    for name in names:
        if match := _NAME.fullmatch(name):
            packages[match[1]].add(name)
    return {
        library: sorted(several)
        for library, several in sorted(packages.items())
        if len(several) > 1
    }


def has_plugin() -> bool:
    """Whether JAX for CUDA is installed; reads no file."""
    return any(re.fullmatch(r"jax-cuda\d+-plugin", name) for name in _packages())


def has_driver() -> bool:
    """Whether the driver of NVIDIA's GPUs is installed."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def loaded_cudnn() -> str:
    """Version and file of the cuDNN that this process has loaded; "": it has none."""
    try:
        library = ctypes.CDLL(_CUDNN, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        library.cudnnGetVersion.restype = ctypes.c_size_t
        version = library.cudnnGetVersion()
    except (OSError, AttributeError):  # not loaded; not Linux
        return ""
    text = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
            path = line[line.find("/") :]
            if os.path.basename(path).startswith(_CUDNN):
                return f"{text} from {path}"
    return text


def _packages() -> list[str]:
    """Names of all packages that Python would find, sorted, as on PyPI."""
    names = set()
    for place in sys.path:
        with contextlib.suppress(OSError):
            for name in os.listdir(place or "."):
                if name.endswith(".dist-info"):
                    names.add(name.partition("-")[0].replace("_", "-").lower())
    return sorted(names)
