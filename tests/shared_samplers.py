"""Samplers that share their compiled programs, for tests that open many."""

import contextlib
import threading

import pytest

from mvc_jax.generation import image_sampler


@contextlib.contextmanager
def shared_programs():
    """Samplers with equal settings and models compile once in the block."""
    programs, lock = {}, threading.Lock()
    jit_sample_images = image_sampler.jit_sample_images

    def cached(model, network, settings, mesh, **options):
        key = (settings, repr(model.configs), repr(network), mesh, *options.values())
        with lock:
            if key not in programs:
                programs[key] = jit_sample_images(
                    model, network, settings, mesh, **options
                )
            return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_sampler, "jit_sample_images", cached)
        yield
