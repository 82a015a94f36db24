"""Shared fixtures, and strictness for tests only: shapes, ranks, eight devices."""

import functools
import gc
import importlib
import importlib.util
import os
import pathlib
import shutil
import signal
from unittest import mock

# These run first, so that parallel workers end at about the same time.
SLOW_FILES = (
    "test_pipeline.py",
    "test_devices.py",
    "test_finetune.py",
    "test_companions.py",
    "test_parity.py",
)

# Their time is compilation, of programs at toy sizes: half as long for slower ones.
COMPILED_FAST = ("test_companions.py", "test_devices.py")

# As `runtime.set_up` does, before the libraries' thousands of modules are imported.
gc.set_threshold(10_000)

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = ROOT / ".pytest_cache" / "xla"

# A shell starts what it puts in the background with SIGINT ignored, and processes that
# the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from jaxtyping import _import_hook, install_import_hook  # noqa: E402


def _exec_module(loader, module):
    """Executes a module outside of the hook's patch of Python's bytecode cache.

    Within it, as jaxtyping does it, the libraries that the module imports, thousands of
    files, are compiled from source: 10 s of every process that writes no bytecode.
    """
    tag = loader._typechecker.get_hash()
    named = functools.partial(_import_hook._optimized_cache_from_source, tag)
    with mock.patch("importlib._bootstrap_external.cache_from_source", named):
        code = loader.get_code(module.__name__)
    exec(code, module.__dict__)


_import_hook._JaxtypingLoader.exec_module = _exec_module
install_import_hook("mvc_jax", "beartype.beartype")

# The parity tests compare Flax with the PyTorch classes of the same libraries.
os.environ["USE_TORCH"] = "1"
from mvc_jax.models import flax_classes  # noqa: E402, F401

del os.environ["USE_TORCH"]  # not for subprocesses

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from fork_server import serving  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="module", autouse=True)
def _compiled_fast(request):
    fast = request.path.name in COMPILED_FAST
    jax.config.update("jax_disable_most_optimizations", fast)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Stable Diffusion of the real layout: (architecture, host parameters).

    8 px images, 2x2 latents, 12 tokens of width 16; its biases are not zero.
    """
    from mvc_jax.checkpoints import clip_tokenizer
    from mvc_jax.models import stable_diffusion
    from mvc_jax.pretraining import tokenizer
    from mvc_jax.pretraining.small import SCHEDULER

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train(
        folder, ["a bold stroke, a photo of digit one"], vocab_size=540, max_length=12
    )
    read = clip_tokenizer.read(folder)[0]
    unet = {
        "sample_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "block_out_channels": [32],
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    }
    vae = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [4, 4, 4],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 8,
        "scaling_factor": 0.5,
    }
    text = {
        "vocab_size": len(read),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "hidden_act": "quick_gelu",
        "bos_token_id": read.bos_token_id,
        "eos_token_id": read.eos_token_id,
    }
    configs = {"unet": unet, "vae": vae, "text_encoder": text, "scheduler": SCHEDULER}
    model = stable_diffusion.StableDiffusion(configs, read)
    rng = np.random.default_rng(0)
    params = {
        name: jax.tree.map(
            lambda leaf: leaf + rng.normal(0, 0.02, leaf.shape).astype(np.float32),
            stable_diffusion.random_params(model.shapes(name), rng),
        )
        for name in model.components
    }
    return model, params


@pytest.fixture(scope="session")
def original(tiny, tmp_path_factory):
    """`tiny` as a folder in the diffusers layout; nobody writes into it."""
    from mvc_jax.checkpoints import diffusers_layout

    folder = tmp_path_factory.mktemp("base") / "model"
    diffusers_layout.save(folder, *tiny)
    return folder


@pytest.fixture
def saved(original, tmp_path):
    """A copy of `original`, to be modified."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture(scope="session")
def write_shards():
    """A function `(folder, array)` that writes an array as `encode` does."""
    from mvc_jax.data import shards

    def write(folder, array):
        shape, dtype = array.shape[1:], array.dtype.name
        writer = shards.Writer(folder, rows=len(array), row_shape=shape, dtype=dtype)
        for rows in writer.missing:
            writer.write(rows, array[rows.start : rows.stop])
        return writer.names

    return write


def _import_or_fail(name: str, extra: str):
    """Imports a package; fails without it, or skips if a variable says so."""
    if importlib.util.find_spec(name) is not None:
        return importlib.import_module(name)
    variable = f"MVC_JAX_WITHOUT_{name.upper()}"
    if os.environ.get(variable) == "1":
        pytest.skip(f"{variable}=1, and {name} is not installed")
    pytest.fail(f"no {name}: install the extra `{extra}`, or set {variable}=1")


@pytest.fixture(scope="session")
def torch():
    return _import_or_fail("torch", "torch")


@pytest.fixture(scope="session")
def fork_server():
    """Starts processes like a user's without the seconds of imports."""
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def s3():
    """A server of Amazon's protocol."""
    import remote_servers

    with remote_servers.serve_s3() as store:
        yield store


@pytest.fixture(scope="session")
def tensorflow_is_there():
    """For subprocesses only: this process must never import it."""
    if importlib.util.find_spec("tensorflow") is None:
        _import_or_fail("tensorflow", "prepare")
