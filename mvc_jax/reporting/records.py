"""What stages recorded of themselves, and of the data."""

from typing import Any

from etils import epath

from mvc_jax import files


def splits(workdir: epath.Path, captions: dict[str, dict]) -> dict[str, Any]:
    """Counts the captioned images of each split, and ids in more than one split."""
    ids = files.read_json(workdir / "caption" / "splits.json")
    captioned = {name: sum(i in captions for i in ids[name]) for name in ids}
    shared = sum(map(len, ids.values())) - len(set().union(*ids.values()))
    return {"captioned": captioned, "shared": shared}


def manifests(workdir: epath.Path) -> dict[str, dict]:
    """Reads the manifests of the other finished stages, by name."""
    paths = {
        path.parent.name: path for path in files.matching(workdir, "*/manifest.json")
    }
    return {
        name: files.read_json(paths[name]) for name in sorted({*paths} - {"report"})
    }


def versions(manifests: dict[str, dict]) -> dict[str, dict[str, list[str]]]:
    """Package -> version -> the stages that used it."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage, manifest in manifests.items():
        for package, version in manifest["versions"].items():
            found.setdefault(package, {}).setdefault(version, []).append(stage)
    return found


def settings(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The fields of a config with their dotted names, in order."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += settings(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
