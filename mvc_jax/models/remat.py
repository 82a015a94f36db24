"""Rematerialisation: which activations the UNet's backward pass recomputes.

Modules are selected by their paths, so that no class needs an option for it.
"""

import contextlib
import re

import flax.linen as nn

_STAGE = r"(down_blocks_\d+|mid_block|up_blocks_\d+)"
_BLOCK = rf"{_STAGE}/(resnets|attentions)_\d+"

# Patterns of the paths of modules of which only the inputs are kept. In `full` a stage
# and, within it, its blocks are checkpoints: one block's activations are alive at a
# time.
MODES = {"none": (), "blocks": (_BLOCK,), "full": (_STAGE, _BLOCK)}


def recomputes(mode: str, path: tuple[str, ...]) -> bool:
    """Whether the layer at `path` is within a module that `mode` selects."""
    return any(re.match(f"{rule}/", "/".join(path)) for rule in MODES[mode])


def checkpointing(mode: str) -> contextlib.AbstractContextManager:
    """Context in which the UNet is rematerialised according to `mode`, one of `MODES`.

    Each block is a `jax.checkpoint` of its own, instead of one policy for the whole
    UNet: its recomputation then waits for its own gradient, and an accelerator's
    scheduler cannot start all of them at once. XLA's CPU backend drops these barriers
    before it schedules, and saves memory only with its depth-first scheduler
    (`xla_cpu_enable_concurrency_optimized_scheduler=false`).
    """
    inside: set[tuple[str, ...]] = set()

    def intercept(next_call, args, kwargs, context):
        path = context.module.path
        if (
            context.method_name != "__call__"
            or path in inside
            or not any(re.fullmatch(rule, "/".join(path)) for rule in MODES[mode])
        ):
            return next_call(*args, **kwargs)
        flags = {key: value for key, value in kwargs.items() if isinstance(value, bool)}
        arrays = {key: value for key, value in kwargs.items() if key not in flags}
        inside.add(path)  # the call below is intercepted again
        try:
            return nn.remat(
                lambda module, args, arrays: module(*args, **arrays, **flags)
            )(context.module, args, arrays)
        finally:
            inside.discard(path)

    return nn.intercept_methods(intercept)
