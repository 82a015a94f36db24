"""Package metadata. The settings of the tools are in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

REQUIRED = [
    "absl-py",
    # diffusers 0.39 is the last release with Flax classes, transformers 4.57 the last
    # line with Flax CLIP (and it wants huggingface_hub below 1).
    "diffusers==0.39.0",
    "etils[epath]>=1.12",
    "flax>=0.12.8",
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
    "tensorflow-datasets",  # reads what is prepared; TensorFlow only prepares it
    "threadpoolctl",
    "tokenizers",
    "tqdm",
    "transformers==4.57.6",
]

EXTRAS = {
    "cuda": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    "caption": ["torch"],  # BLIP-2
    # To prepare TFDS datasets; TFDS imports importlib_resources without asking for it.
    "prepare": ["tensorflow-cpu", "importlib_resources"],
    # Live tests beside PyTorch; peft is what diffusers loads adapters with.
    "torch": ["torch==2.13.0", "peft>=0.21"],
    "dev": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "beartype",
        "datasets>=4",
        "uv",
    ],
}

setup(
    name="mvc_jax",
    version="0.1.0",
    description="Enlarge a small labelled image dataset by Mixing Visual Concepts.",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # An installed copy holds the configs as a real package; in a checkout, where they
    # lie beside the package, mvc_jax/configs.py leads to them.
    packages=[*find_packages(include=["mvc_jax", "mvc_jax.*"]), "mvc_jax.configs"],
    package_dir={"mvc_jax.configs": "configs"},
    package_data={"mvc_jax": ["*.j2"], "mvc_jax.augment": ["*.csv"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mvc-jax = mvc_jax.train:main"]},
)
