"""Files on the Hugging Face hub and in object stores, through fsspec."""

from typing import Any

from mvc_jax.errors import UserError

_PACKAGES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "az": "adlfs",
    "abfs": "adlfs",
}


def is_remote(path: str) -> bool:
    return "://" in path


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path there.

    Raises:
      UserError: its package is not installed, or there is no such protocol.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(protocol, "")
        raise UserError(
            "config.data.source",
            wanted=f"a protocol that fsspec knows, for {url}",
            got=f"{type(error).__name__}: {error}",
            fix=f"Run `pip install {package}`." if package else "Correct it.",
        ) from error
    return system, path.rstrip("/") if path.strip("/") else path
