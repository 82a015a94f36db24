"""An image tower and a ControlNet for the small base: trained, written, read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sd_parity import jit_fast

from mvc_jax.checkpoints import clip_checkpoint, diffusers_layout
from mvc_jax.data import edges
from mvc_jax.models import clip
from mvc_jax.pretraining import base, companions
from mvc_jax.training import rng, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.loop import create_state
from mvc_jax.training.train_logger import TrainLogger

TOWER = {"patch": 4, "width": 16, "layers": 1, "heads": 2}


@pytest.fixture(scope="module")
def pool():
    """Dark and bright images of 8 px, with different prompts."""
    draw = np.random.default_rng(0)
    bright = np.arange(24) % 2
    images = draw.integers(0, 60, (24, 8, 8, 3)) + 180 * bright[:, None, None, None]
    moments = draw.normal(size=(24, 2, 2, 8)).astype(np.float32)
    prompts = tuple(("a bold stroke", "a photo of one")[kind] for kind in bright)
    return companions.Pool(images.astype(np.uint8), moments, prompts)


def _loop(folder, steps):
    return base.Loop(
        mesh=sharding.make_mesh(devices=jax.devices()[:2]),
        steps=steps,
        checkpoints=Checkpoints(folder / "checkpoints", every=1000),
        logger=TrainLogger(folder, "pretrain/part", log_every=1000),
    )


def test_an_image_tower_learns_the_texts_of_the_images(tiny, pool, tmp_path, torch):
    model, params = tiny
    options = {"seed": 0, "batch_size": 20, "learning_rate": 1e-2, **TOWER}
    loop = _loop(tmp_path / "run", 40)
    tower, trained = companions.train_image_encoder(
        model, params, pool, loop=loop, **options
    )
    images = np.asarray(
        jax.jit(tower.image_embeddings)(trained, tower.preprocess(pool.images))
    )
    pooled = jax.jit(model.pooled_text)
    texts = pooled(params, jnp.asarray(model.tokenize(pool.prompts[:2])))
    nearest = np.argmax(images @ np.asarray(clip.normalize(texts)).T, axis=1)
    np.testing.assert_array_equal(nearest, np.arange(24) % 2)

    # In the layout of diffusers, as its pipelines read it.
    clip_checkpoint.save(tmp_path / "model", tower, trained)
    diffusers_layout.save(
        tmp_path / "model", model, params, index_entries=clip_checkpoint.INDEX_ENTRIES
    )
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    inputs = pipeline.feature_extractor(list(pool.images), return_tensors="pt")
    with torch.no_grad():
        theirs = pipeline.image_encoder(**inputs).image_embeds.numpy()
    np.testing.assert_allclose(images, theirs, atol=1e-5, rtol=1e-5)


def test_a_step_moves_the_controlnet_away_from_zero(tiny, pool):
    """Every zero convolution gets a gradient at once (arXiv 2302.05543, 3.1)."""
    model, params = tiny
    network = companions.new_controlnet(model)
    start = companions.initial_controlnet_params(
        network, params["unet"], np.random.default_rng(0)
    )
    tx = optax.sgd(1.0)
    step = functools.partial(
        companions.control_step,
        model=model,
        network=network,
        tx=tx,
        key=rng.purpose_key(0, "test"),
        drop_rate=0.5,
    )
    batch = {
        "edges": jnp.asarray(edges.canny(pool.images[:3])),
        "moments": jnp.asarray(pool.moments[:3]),
        "ids": jnp.asarray(model.tokenize(pool.prompts[:3])),
        "null_ids": jnp.asarray(model.tokenize([""])),
        "base": {name: params[name] for name in ("text_encoder", "unet")},
        "weight": jnp.asarray([1.0, 1.0, 0.0]),
    }
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    state = create_state(start, tx, mesh)
    moved, metrics = jit_fast(step)(state, batch)
    assert np.isfinite(metrics["loss"])
    for name, tree in moved.params.items():
        if name.startswith("controlnet_") and name != "controlnet_cond_embedding":
            assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(tree)), name


def test_edges_are_those_of_the_images(tiny, pool, tmp_path):
    """The ControlNet's input has the size of the images, not of the latents."""
    seen = {}

    class Loop(base.Loop):
        def fit(self, train_step, state, *, read, constants):
            seen.update(read(0), constants=constants)
            return state

    square = np.zeros((24, 8, 8, 3), np.uint8)
    square[:, 2:6, 2:6] = 255
    model, params = tiny
    companions.train_controlnet(
        model,
        params,
        dataclasses.replace(pool, images=square),
        seed=0,
        loop=Loop(**vars(_loop(tmp_path, 1))),
        batch_size=4,
        learning_rate=1e-2,
        drop_rate=0.0,
    )
    assert seen["edges"].shape == (4, 8, 8, 3) and seen["edges"].max() == 255
    assert set(seen["constants"]["base"]) == {"text_encoder", "unet"}
