"""`mvc-jax doctor`: what this machine has, and what is missing for which stage."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence

import packaging.requirements
import psutil
from etils import epath

from mvc_jax import __version__
from mvc_jax.configs import common
from mvc_jax.errors import UserError
from mvc_jax.training import cuda_libraries, runtime

_HELP = """What this machine has, and what is missing for which stage, in one screen:
    mvc-jax doctor
The exit code is 2 where no stage could run.
"""
_GIB = 2**30
# Extra -> what it is for, by stage; "": of no stage, and not shown.
_PURPOSES = {
    "caption": "caption: captions by BLIP-2",
    "medical": "caption: DICOM images",
    "heic": "caption: HEIC images",
    "gcs": "caption: images at gs://",
    "s3": "all: images and workdirs at s3://",
    "prepare": "caption: TFDS datasets that are not prepared yet",
    "inception": "evaluate: FID, features=inception",
    "tensorboard": "to look at what runs log",
    "wandb": "all: track=wandb",
    "mlflow": "all: track=mlflow",
    "cuda": "all: NVIDIA GPUs",
    "cuda12": "all: NVIDIA GPUs with older drivers",
    "tpu": "all: TPUs",
}
_OK, _MISSING = "installed", "missing"


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that the project asks for.

    Attributes:
      wanted: the requirement, e.g. `diffusers==0.39.0`.
      version: that is installed; "": none.
      extra: that asks for it; "": the project itself.
      fits: whether the version is one that is wanted.
    """

    wanted: str
    version: str
    extra: str
    fits: bool


def run(argv: Sequence[str]) -> int:
    """Prints the screen; returns the exit code.

    Args:
      argv: the name of the program, "doctor", and flags.

    Raises:
      UserError: a flag is unknown.
    """
    for word in argv[2:]:
        if word.lstrip("-") in ("help", "h"):
            print(_HELP, end="")
            return 0
        raise UserError("doctor", wanted="no argument", got=word, fix="Leave it out.")
    packages = packages_asked_for()
    faults = [
        f"{x.wanted} ({x.version or 'none'} is installed)"
        for x in packages
        if not x.extra and not x.fits
    ]
    devices, refused = _devices()
    rows = [
        (
            "mvc_jax",
            f"{__version__}, Python {platform.python_version()}, "
            f"{platform.system()} {platform.machine()}",
        ),
        ("packages", _of_packages(packages, faults)),
        ("JAX", _of_jax()),
        ("devices", devices),
        ("memory", _memory()),
        ("disk", _disk()),
        ("programs", _cache()),
        *_extras(packages),
    ]
    for name, text in rows:
        print(f"{name:<13} {text}")
    if faults or refused:
        print("\nno stage can run: see above")
        return 2
    print(
        "\nevery stage can run; what is missing above is needed only for what it names"
    )
    return 0


def packages_asked_for() -> list[Package]:
    """The packages of the project and of its extras; [] of a copy not installed."""
    try:
        lines = importlib.metadata.requires("mvc_jax") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [_package(packaging.requirements.Requirement(line)) for line in lines]


def _package(wanted: packaging.requirements.Requirement) -> Package:
    extra = next(
        (x for x in _all_extras() if wanted.marker and _asks(wanted.marker, x)), ""
    )
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    fits = bool(version) and wanted.specifier.contains(version, prereleases=True)
    for name in wanted.extras:  # as of jax[cuda13], whose plugin is another package
        fits = fits and _has_extra(wanted.name, name)
    text = f"{wanted.name}{wanted.specifier}"
    return Package(text, version, extra, fits)


def _has_extra(package: str, extra: str) -> bool:
    """Whether what an extra of a package adds is installed."""
    for line in importlib.metadata.requires(package) or []:
        wanted = packaging.requirements.Requirement(line)
        if wanted.marker and _asks(wanted.marker, extra):
            try:
                importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                return False
    return True


def _asks(marker: packaging.requirements.Marker, extra: str) -> bool:
    """Whether a marker holds with an extra, and not without."""
    return marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _all_extras() -> list[str]:
    return importlib.metadata.metadata("mvc_jax").get_all("Provides-Extra") or []


def _of_packages(packages: Sequence[Package], faults: Sequence[str]) -> str:
    if not packages:
        return "not known: this copy is not installed (pip install -e .)"
    if faults:
        return (
            "wanted " + "; ".join(faults) + " (pip install -c requirements.lock -e .)"
        )
    count = sum(not package.extra for package in packages)
    return f"all {count} that are required"


def _of_jax() -> str:
    versions = [f"{x} {importlib.metadata.version(x)}" for x in ("jax", "jaxlib")]
    twice = cuda_libraries.for_two_versions(cuda_libraries.installed())
    if twice:
        versions.append("libraries for two versions of CUDA: " + ", ".join(twice))
    if cuda_libraries.has_plugin() and not cuda_libraries.has_driver():
        versions.append("for CUDA, but there is no driver (libcuda.so.1)")
    return ", ".join(versions)


def _devices() -> tuple[str, bool]:
    """The devices in words, and whether JAX cannot use any."""
    try:
        found = runtime.ask_devices()
    except UserError as error:
        return f"none that JAX can use: {error}", True
    size = f", {found.bytes / _GIB:.0f} GiB in all" if found.bytes else ""
    return f"{found.count} x {found.kind}{size}", False


def _memory() -> str:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    return (
        f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} free; "
        f"{cores} cores"
    )


def _disk() -> str:
    disk = shutil.disk_usage(".")
    return f"{disk.free / _GIB:.1f} GiB free in {epath.Path('.').resolve()}"


def _cache() -> str:
    folder = common.FIELDS.fields["compilation_cache"].default
    path = epath.Path(folder).expanduser()
    programs = (
        [x for x in path.iterdir() if x.name.endswith("-cache")]
        if path.exists()
        else []
    )
    size = sum(x.stat().length for x in programs)
    return f"{len(programs)} compiled, {size / 2**20:.0f} MiB in {folder}"


def _extras(packages: Sequence[Package]) -> Iterator[tuple[str, str]]:
    """A row for each extra that a user may want: whether it is installed, and why."""
    yield "extras", _how_to_install()
    for extra, purpose in _PURPOSES.items():
        asked = [package for package in packages if package.extra == extra]
        if not asked:
            continue
        lacking = [package.wanted for package in asked if not package.fits]
        state = _MISSING if lacking else _OK
        yield f"  {extra}", f"{state:<10} {purpose}"


def _how_to_install() -> str:
    """The line that adds an extra to this copy."""
    checkout = "pip install -c requirements.lock -e '.[NAME]'"
    try:
        found = importlib.metadata.distribution("mvc_jax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return checkout
    origin = json.loads(found or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return checkout
    address = f" @ {origin['url']}" if "url" in origin else ""
    return f"pip install 'mvc_jax[NAME]{address}'"
