"""Writes the checkpoints in `releases/`: forms of old and of today's libraries.

    python tests/golden/make_releases.py ENVIRONMENTS

Each release is installed by pip, once, into an environment of its own in the folder
ENVIRONMENTS, where `write_release.py` runs. torchvision, which timm imports, is taken
without its dependencies, so that any build of PyTorch will do.
"""

import io
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import venv

HERE = pathlib.Path(__file__).resolve().parent
RELEASES = {
    "2023": (
        "transformers==4.30.2",
        "diffusers==0.18.2",
        "peft==0.5.0",
        "accelerate==0.21.0",
        "huggingface_hub==0.19.4",
        "timm==0.9.2",
        "numpy==1.26.4",
    ),
    "2026": (
        "transformers==5.24.0",
        "diffusers==0.42.1",
        "peft==0.21.2",
        "timm==1.0.31",
    ),
}
TORCH = ("torch==2.13.0", "safetensors", "pillow", "pyyaml")


def environment(folder: pathlib.Path, packages: tuple) -> pathlib.Path:
    """Its Python, with the packages installed."""
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True)
        alone = [name for name in packages if name.startswith("timm")]
        others = [name for name in packages if name not in alone]
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *TORCH, *others], check=True)
        subprocess.run([*pip, "--no-deps", *alone, "torchvision"], check=True)
        (folder / "done").touch()
    return python


def pack(folder: pathlib.Path, archive: pathlib.Path) -> None:
    """Packs files by name alone, without times and owners: equal files, equal bytes."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
                content = path.read_bytes()
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def main() -> None:
    for release, packages in RELEASES.items():
        python = environment(pathlib.Path(sys.argv[1]) / release, packages)
        with tempfile.TemporaryDirectory() as made:
            subprocess.run([python, HERE / "write_release.py", made], check=True)
            for folder in sorted(pathlib.Path(made).iterdir()):
                archive = HERE / "releases" / release / f"{folder.name}.tar.xz"
                archive.parent.mkdir(parents=True, exist_ok=True)
                pack(folder, archive)
                print(f"{release}/{archive.name}: {archive.stat().st_size} bytes")


if __name__ == "__main__":
    main()
