"""Rematerialisation: which activations of the UNet the backward pass computes again.

Chosen by the paths of its modules, so that no class has to know of it.
"""

import contextlib
import re

import flax.linen as nn

_STAGE = r"(down_blocks_\d+|mid_block|up_blocks_\d+)"
_BLOCK = rf"{_STAGE}/(resnets|attentions)_\d+"

# Modules, by path, of which only the inputs are kept. In `full` the blocks of a stage
# are computed once more when the stage is, so that one block's insides are alive.
MODES = {"none": (), "blocks": (_BLOCK,), "full": (_STAGE, _BLOCK)}


def checkpointing(mode: str) -> contextlib.AbstractContextManager:
    """Within it, a UNet that is differentiated keeps what `mode` says.

    Each block is a `jax.checkpoint` of its own, not one policy over the whole UNet: its
    recomputation then waits for its own gradient, and an accelerator's scheduler cannot
    begin all of them at once. XLA's CPU backend drops these barriers before it
    schedules, and saves memory only where its scheduler goes depth first
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
        inside.add(path)  # the call below comes here again
        try:
            return nn.remat(
                lambda module, args, arrays: module(*args, **arrays, **flags)
            )(context.module, args, arrays)
        finally:
            inside.discard(path)

    return nn.intercept_methods(intercept)
