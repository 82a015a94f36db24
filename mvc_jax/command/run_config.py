"""The config of a run: from a Python file, or from the `config.json` of a workdir.

`config.json` is the last config that a workdir was worked on with: with nothing else
but `--workdir`, a run goes on with it. `stages` and `generate.limit` say what one
command does, not what the workdir is made of, so they have their defaults there.
"""

import contextlib
import importlib.util
from collections.abc import Collection, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mvc_jax import configs, files, stage
from mvc_jax.command import pipeline
from mvc_jax.configs import common, fields
from mvc_jax.errors import UserError

DEFAULT = "configs/digits.py"
_FILE = "config.json"
_AGED = ("mix", "generate")  # stages with a field that is `auto` by default
OF_A_COMMAND = ("stages", "generate.limit")


def path_in(workdir: epath.PathLike) -> epath.Path:
    """Where a workdir keeps its config."""
    return epath.Path(workdir) / _FILE


def load(path_and_argument: str) -> ConfigDict:
    """Loads `file.py:argument` or `config.json`; the result is locked.

    Files in `configs/` that are part of the package are found from any directory.

    Raises:
      UserError: there is no such file, or it has no config.
    """
    if path_and_argument.endswith(".json"):  # takes no argument, and may have a colon
        return _load_json(epath.Path(path_and_argument)).lock()
    return _load_python(path_and_argument).lock()


def write(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Makes `config` the one that the workdir goes on with."""
    values, defaults = config.to_dict(), common.FIELDS.flat()
    for name in OF_A_COMMAND:
        *sections, field = name.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[field] = defaults[name].default
    files.write_json(path_in(workdir), values)


def read(workdir: epath.PathLike) -> ConfigDict | None:
    """The config of a workdir; None where there is none that can be read."""
    with contextlib.suppress(UserError):
        return _load_json(path_in(workdir))
    return None


def value(config: ConfigDict, name: str) -> Any:
    """The value of a field, by its dotted name."""
    for part in name.split("."):
        config = config[part]
    return config


def as_begun(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    redo: Collection[str] = (),
    sources: Sequence[epath.PathLike] = (),
) -> ConfigDict:
    """The config with what `auto` stands for in stages that are older than its field.

    So they count as unchanged, and go on as they began.

    Args:
      config: of the run.
      workdir: of the run.
      redo: stages that are made again, for which it is the default.
      sources: other workdirs, from which stages may be taken over.
    """
    config = config.copy_and_resolve_references()
    for name, before in _earlier(config).items():
        section, field = name.split(".")
        if config[section][field] != "auto" or section in redo:
            continue
        records = (stage.recorded(folder, section) for folder in [workdir, *sources])
        settings = next((r["settings"][section] for r in records if r), None)
        if settings is not None and field not in settings:
            config[section][field] = before
    return config.lock()


def _earlier(config: ConfigDict) -> dict[str, str]:
    """Fields that are `auto` -> what was done before there was the field."""
    specs = [pipeline.module(name).stage_spec(config) for name in _AGED]
    return {name: value for spec in specs for name, value in spec.earlier.items()}


def _load_python(path_and_argument: str) -> ConfigDict:
    """Calls `get_config(argument)` of a file."""
    path, _, argument = path_and_argument.partition(":")
    found = epath.Path(path)
    if not found.exists() and found.parts[:1] == ("configs",):
        for folder in configs.__path__:
            found = epath.Path(folder).joinpath(*epath.Path(path).parts[1:])
    if not found.is_file() or found.suffix != ".py":
        raise UserError(
            f"--config={path}",
            wanted="a Python file with get_config(), or the config.json of a workdir",
            got="a folder" if found.is_dir() else "no such file",
            fix=f"Try --config={DEFAULT}.",
        )
    try:
        spec = importlib.util.spec_from_file_location(f"config_{found.stem}", found)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(*[argument] if argument else [])
        if not isinstance(config, ConfigDict) or "stages" not in config:
            raise TypeError(
                f"get_config() returned {type(config).__name__} without stages"
            )
        common.FIELDS.check_names(config)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"--config={path_and_argument}",
            wanted="a Python file whose get_config() returns a ConfigDict",
            got=f"{type(error).__name__}: {error}",
            fix=f"Correct the file; {DEFAULT} is an example.",
        ) from error
    return config


def _load_json(path: epath.Path) -> ConfigDict:
    """Reads what `write` wrote; fields that are newer than the file have defaults.

    Where the default is not what was done without the field, they have that instead.
    """
    try:
        values = files.read_json(path)
    except FileNotFoundError as error:
        raise _error(path, "the config.json of a workdir", "no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        why = f"a damaged file ({error})"
        raise _error(path, "the JSON that a run wrote", why) from error
    config = ConfigDict(_merge(common.FIELDS, values, path))
    for name, before in _earlier(config).items():
        section, field = name.split(".")
        if section in values and field not in values[section]:
            config[section][field] = before
    for name in OF_A_COMMAND:
        default = common.FIELDS.flat()[name].default
        config.update_from_flattened_dict({name: default})
    return config


def _merge(
    part: fields.Section | fields.Field, value: Any, path: epath.Path, name: str = ""
) -> Any:
    """A value of JSON as that of a field, or of every field of a section.

    Raises:
      UserError: a field is unknown or has another type.
    """
    if isinstance(part, fields.Field):
        if part.kind is tuple and isinstance(value, list):
            whole = part.item is float  # JSON of another program may have 1 for 1.0
            value = tuple(float(x) if whole and type(x) is int else x for x in value)
        elif part.kind is float and type(value) is int:
            value = float(value)
        if not part.accepts(value):
            raise _error(path, f"{part.wanted} as {name}", repr(value))
        return value
    if not isinstance(value, dict):
        raise _error(path, f"fields of {name or 'a config'}", repr(value))
    for key in value.keys() - part.fields.keys():
        inner = f"{name}.{key}".strip(".")
        known = ", ".join(sorted(part.fields))
        raise _error(path, f"fields of this version ({known})", f"also {inner}")
    return {
        key: _merge(inner, value[key], path, f"{name}.{key}".strip("."))
        if key in value
        else inner.defaults()
        if isinstance(inner, fields.Section)
        else inner.default
        for key, inner in part.fields.items()
    }


def _error(path: epath.Path, wanted: str, got: str) -> UserError:
    return UserError(
        str(path),
        wanted=wanted,
        got=got,
        fix="Correct it, or name the config that the workdir was made with, e.g. "
        f"--config={DEFAULT}.",
    )
