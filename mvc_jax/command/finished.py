"""Workdirs whose stages are finished, and those of their config."""

from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from mvc_jax import stage
from mvc_jax.command import plan, run_config
from mvc_jax.errors import UserError


def require(workdir: epath.Path, names: Sequence[str]) -> ConfigDict:
    """The config of a workdir whose stages of these names are finished and up to date.

    Raises:
      UserError: they are not, or one of their files is missing or was changed.
    """
    config, got = run_config.read(workdir), ""
    fix = "Finish the run first, by the command that began it."
    missing = [name for name in names if not stage.is_complete(workdir, name)]
    if not workdir.is_dir():
        got, fix = "no such folder", "Correct the path."
    elif config is None:
        got = "a folder without a config.json that can be read"
    elif missing:
        got = f"one whose stage {missing[0]} is not finished"
    else:
        behind, way = plan.behind(names, run_config.as_begun(config, workdir), workdir)
        if not behind:
            return config
        why = "; ".join(dict.fromkeys(behind.values()))
        got, fix = f"one that is behind ({why})", f"For it, {way}."
    raise UserError(str(workdir), wanted="a finished workdir", got=got, fix=fix)
