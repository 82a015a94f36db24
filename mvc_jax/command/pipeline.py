"""The ten stages in their order, and which of them reads which."""

from collections.abc import Collection, Iterable
from typing import Any

from etils import epath, epy
from ml_collections import ConfigDict

from mvc_jax import stage
from mvc_jax.errors import UserError

with epy.lazy_imports():  # imported at first use: a mistyped flag need not wait for JAX
    from mvc_jax import (
        caption,
        classify,
        encode,
        evaluate,
        finetune,
        generate,
        mix,
        pairs,
        pretrain,
        report,
    )

_MODULES = {
    "caption": caption,
    "pretrain": pretrain,
    "encode": encode,
    "pairs": pairs,
    "finetune": finetune,
    "mix": mix,
    "generate": generate,
    "classify": classify,
    "evaluate": evaluate,
    "report": report,
}
STAGES = tuple(_MODULES)
MESH_STAGES = ("pretrain", "encode", "finetune", "generate", "classify")
# Of several processes the first alone runs these, and the others wait for it.
OF_REAL_IMAGES = ("caption", "classify", "evaluate", "report")  # need no generator
ALONE = ("pairs", "mix", "report")


def module(name: str) -> Any:
    """The module of a stage, with its `check`, `stage_spec` and `run`."""
    return _MODULES[name]


def select(config: ConfigDict) -> list[str]:
    """The stages of `config.stages`, in the pipeline's order.

    `all` includes `pretrain` only if `config.base.path` is empty, and no stage of the
    generator if `config.generate.sets` is.

    Raises:
      UserError: a name is unknown.
    """
    names = [name.strip() for name in config.stages.split(",") if name.strip()]
    if names == ["all"] and not config.generate.sets:
        return [*OF_REAL_IMAGES]
    if names == ["all"]:
        return [name for name in STAGES if name != "pretrain" or not config.base.path]
    unknown = [name for name in names if name not in STAGES]
    if not names or unknown:
        raise UserError(
            "config.stages",
            wanted=f"all, or some of {','.join(STAGES)}",
            got=repr(",".join(unknown) or config.stages),
            fix="Correct the list, e.g. --config.stages=generate,classify.",
        )
    return [name for name in STAGES if name in names]


def needed(names: Iterable[str], config: ConfigDict) -> list[str]:
    """These stages and all that they read, directly or not, in order."""
    found = {*names}
    for name in reversed(STAGES):
        if name in found:
            found |= {*module(name).stage_spec(config).inputs}
    return [name for name in STAGES if name in found]


def dependents(
    names: Iterable[str], config: ConfigDict, workdir: epath.Path
) -> list[str]:
    """These stages and all that read them, directly or not, in order.

    What a stage reads now counts, and what it read when it was last run.
    """
    found = {*names}
    for name in STAGES:
        read = {*module(name).stage_spec(config).inputs}
        if found & (read | stage.recorded_inputs(workdir, name)):
            found.add(name)
    return [name for name in STAGES if name in found]


def in_order(names: Collection[str]) -> list[str]:
    return [name for name in STAGES if name in names]
