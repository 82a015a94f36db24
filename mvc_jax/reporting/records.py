"""What stages recorded of themselves: manifests, times, splits."""

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


def timings(workdir: epath.Path) -> dict[str, dict[str, float]]:
    """Reads the times of stages, without those of a damaged file."""
    names = ("seconds", "compile_seconds", "peak_rss_mib")
    return {
        stage: row
        for stage, row in files.read_record(workdir / "timings.json").items()
        if isinstance(row, dict)
        and all(type(row.get(name)) in (int, float) for name in names)
    }
