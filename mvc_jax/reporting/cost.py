"""What a run took: time and memory of its stages, and of an image."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from mvc_jax import files

_NUMBERS = ("seconds", "compile_seconds", "peak_rss_mib")


def table(
    workdir: epath.Path, manifests: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The times of the stages, without those of a damaged file.

    Args:
      workdir: of the run.
      manifests: of its stages.

    Returns:
      None without times; else `stages`, with numbers and a share of the longest, and
      `images`: what the stages took for each image that they saw or made.
    """
    rows = {
        stage: row
        for stage, row in files.read_record(workdir / "timings.json").items()
        if isinstance(row, dict)
        and all(type(row.get(name)) in (int, float) for name in _NUMBERS)
        and stage != "report"
    }
    if not rows:
        return None
    longest = max(0.001, *(row["seconds"] for row in rows.values()))
    return {
        "stages": [
            {
                "name": name,
                **row,
                "share": row["seconds"] / longest,
                "compiling": min(
                    row["compile_seconds"] / max(row["seconds"], 0.001), 1
                ),
                "counts": manifests.get(name, {}).get("counts", {}),
                "devices": devices(row),
            }
            for name, row in rows.items()
        ],
        "images": _images(rows, manifests),
        "total": sum(row["seconds"] for row in rows.values()),
    }


def devices(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Kind and number of the accelerators of a stage; None: there were none."""
    found = row.get("devices")
    valid = isinstance(found, dict) and {"kind", "count"} <= found.keys()
    return found if valid and str(found["kind"]).lower() != "cpu" else None


def _images(
    rows: Mapping[str, Any], manifests: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What an image took in the stages that train on images, or make them."""
    counts = {name: x.get("counts", {}) for name, x in manifests.items()}
    settings = manifests.get("finetune", {}).get("settings", {}).get("finetune", {})
    seen = counts.get("finetune", {}).get("steps", 0) * settings.get("batch_size", 0)
    made = {
        "finetune": (seen, "image trained on"),
        "generate": (counts.get("generate", {}).get("images", 0), "image made"),
    }
    found = []
    for name, (images, what) in made.items():
        if images and name in rows and not rows[name].get("taken_over"):
            row, used = rows[name], devices(rows[name])
            running = max(row["seconds"] - row["compile_seconds"], 0)
            found.append(
                {
                    "stage": name,
                    "what": what,
                    "images": images,
                    "seconds": running / images,
                    "with_compiling": row["seconds"] / images,
                    "devices": used,
                    "device_hours": used
                    and row["seconds"] * used["count"] / 3600 / images,
                }
            )
    return found
