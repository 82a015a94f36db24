"""mvc_jax: enlarge a small labelled image dataset by Mixing Visual Concepts.

What is public is in `__all__` here and in `__all__` of these modules; the rest may move
from one release to the next.

    run                       a whole run, from a config
    mixing.coarse_mix         whole tokens of a text state replaced by a partner's
    mixing.fine_mix           a few dims of them
    pipeline.InstructPix2Pix  a fine-tuned model that draws images
    augment.policy            an augmentation policy by name
    classifiers.create        a classifier by name or from a checkpoint
    data.open_source          a labelled data set
"""

import importlib
import os
from typing import Any

__version__ = "0.1.0"
__all__ = ["augment", "classifiers", "data", "mixing", "pipeline", "run"]


def run(config: Any, workdir: os.PathLike | str) -> dict[str, Any]:
    """Runs the stages of `config.stages`, as `mvc-jax` does; what is there is kept.

    Progress goes to `absl.logging`, and to stderr in a program without handlers of its
    own.

    >>> from mvc_jax.configs import digits
    >>> config = digits.get_config()
    >>> config.stages = "caption"
    >>> run(config, workdir)
    {}

    Args:
      config: a `ConfigDict` of `mvc_jax.configs`, e.g. `digits.get_config()` or
        `folder.get_config("path=/data/parts")`, with any of its fields changed.
      workdir: the folder of the run's files.

    Returns:
      what `evaluate` wrote to `metrics.json`; {} if it is not among the stages.

    Raises:
      UserError: a field, a file or the machine is wrong; nothing that was finished is
        lost.
    """
    # Here: a flag that is mistyped need not wait for the rest.
    from etils import epath

    from mvc_jax import files, train
    from mvc_jax.command import pipeline
    from mvc_jax.training import console

    workdir = epath.Path(workdir)
    with console.shown():
        train.run(config, workdir, announce=lambda steps: None)  # prints no table
    if "evaluate" not in pipeline.select(config) or config.generate.limit:
        return {}
    return files.read_json(workdir / "evaluate" / "metrics.json")


def __getattr__(name: str) -> Any:
    """Imports what is public when it is first used."""
    if name in __all__:
        return importlib.import_module(f"mvc_jax.{name}")
    raise AttributeError(f"module 'mvc_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
