"""Samplers that share their compiled programs, for tests that open many."""

import contextlib

import pytest

from mvc_jax.generation.image_sampler import ImageSampler


@contextlib.contextmanager
def shared_programs():
    """Samplers with equal settings, models and devices compile once in the block."""
    programs = {}
    compiled = ImageSampler._compiled

    def cached(self, model, network):
        key = (self.settings, self._mesh, repr(model.configs), repr(network))
        if key not in programs:
            programs[key] = compiled(self, model, network)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageSampler, "_compiled", cached)
        yield
