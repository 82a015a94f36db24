"""The section `data` of the config, as the stages record it in their manifests."""

from collections.abc import Mapping
from typing import Any

# Fields that are younger than the manifests of some workdirs, and their defaults.
LATER = {
    "train": (),
    "test": (),
    "labels": "",
    "validation": "join",
    "group": "",
}


def recorded(section: Mapping[str, Any]) -> dict[str, Any]:
    """The fields to record: later ones only where they differ from their default.

    A stage that was finished before a field existed was made as if it had its default,
    and so remains finished.
    """
    return {
        name: value
        for name, value in section.items()
        if name not in LATER or value != LATER[name]
    }
