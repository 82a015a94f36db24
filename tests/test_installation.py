"""The documented installations: locked versions, and one version of CUDA in each."""

import ast
import collections
import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile

import pytest
import yaml
from absl import logging
from documented import DOCUMENTS, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mvc_jax
from mvc_jax.training import cuda_libraries, runtime

LOCKS = {  # and the one cuDNN of each
    "requirements.lock": "nvidia-cudnn-cu13",
    "requirements-cuda.lock": "nvidia-cudnn-cu13",
    "requirements-cuda12.lock": "nvidia-cudnn-cu12",
}
OF_CUDA = re.compile(
    r"(torch(?!-)|torchvision|triton|libtpu|jax-cuda|cuda|nvidia)($|-|\d)"
)
SETUP = {
    node.targets[0].id: ast.literal_eval(node.value)
    for node in ast.parse((ROOT / "setup.py").read_text()).body
    if isinstance(node, ast.Assign) and node.targets[0].id in ("REQUIRED", "EXTRAS")
}


def locked(name):
    """Package -> version of a lock, for all systems."""
    rows = (ROOT / name).read_text().splitlines()
    wanted = [Requirement(row) for row in rows if row[0] not in "# "]
    return {
        canonicalize_name(row.name): str(row.specifier).removeprefix("==")
        for row in wanted
    }


def choose_lock(*extras):
    """Runs `launch/setup_env.sh` to the lock that it would install extras with."""
    script = f'. {ROOT}/launch/setup_env.sh; choose_lock "$1"; echo "$lock"'
    return subprocess.run(
        ["bash", "-ec", script, "bash", "\n".join(extras)],
        env={"PATH": os.environ["PATH"], "VENV": "nowhere"},
        capture_output=True,
        text=True,
    )


def documented():
    """(file, lock, extras) of all that installs the package by pip or by a script."""
    scripts = [*ROOT.glob("launch/*.sh"), *ROOT.glob("benchmarks/*.py")]
    for path in [*DOCUMENTS, *scripts]:
        text = path.read_text()
        pattern = r"pip install([^#\n]*?) -e [\"']\.\[([\w,-]+)\]"
        for options, extras in re.findall(pattern, text):
            lock = re.search(r"-c (\S+)", options)
            yield path.name, lock and lock[1], extras
        for extras in re.findall(r"\bEXTRAS=([\w,-]+)", text):
            lock = choose_lock(*extras.split(",")).stdout.strip()
            yield path.name, lock, extras


def missing(lock, extras):
    """What extras require, at first hand and by JAX's extras, and a lock lacks."""
    versions = locked(lock)
    rows = SETUP["REQUIRED"] + [row for e in extras for row in SETUP["EXTRAS"][e]]
    wanted = [Requirement(row) for row in rows]
    for extra in {e for row in wanted if row.name == "jax" for e in row.extras}:
        of_jax = map(Requirement, importlib.metadata.requires("jax"))
        wanted += [
            r for r in of_jax if r.marker and r.marker.evaluate({"extra": extra})
        ]
    return [
        str(row)
        for row in wanted
        if versions.get(canonicalize_name(row.name), "none") not in row.specifier
    ]


def test_every_documented_installation_is_locked():
    found = set(documented())
    extras = {each for _, _, extras in found for each in extras.split(",")}
    assert {"cuda", "cuda12", "tpu", "caption", "tensorboard", "aot-gpu"} <= extras
    for place, lock, extras in found:
        assert lock in LOCKS, (place, extras)
        assert missing(lock, extras.split(",")) == [], (place, lock, extras)
    assert missing("requirements-cuda12.lock", ["cuda"])  # the check finds something
    assert missing("requirements.lock", ["cuda"])


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_each_library_for_one_version_of_cuda(lock):
    names = locked(lock)
    assert not cuda_libraries.for_two_versions(names)
    assert [name for name in names if "cudnn" in name] == [LOCKS[lock]]
    assert "torch" in names


def test_locks_differ_in_what_depends_on_cuda_alone():
    versions = collections.defaultdict(set)
    for lock in LOCKS:
        for name, version in locked(lock).items():
            versions[name].add(version)
    differing = [name for name, several in versions.items() if len(several) > 1]
    assert [name for name in differing if not OF_CUDA.match(name)] == []


def test_scripts_choose_the_lock_and_refuse_two_versions_of_cuda():
    assert choose_lock("dev", "prepare").stdout == "requirements.lock\n"
    assert choose_lock("cuda", "dev").stdout == "requirements-cuda.lock\n"
    assert choose_lock("aot-gpu").stdout == "requirements-cuda.lock\n"
    assert choose_lock("caption", "cuda12").stdout == "requirements-cuda12.lock\n"
    refused = choose_lock("cuda", "cuda12")
    assert refused.returncode and "set VENV to a new folder" in refused.stderr


def test_one_library_for_two_versions():
    both = ["nvidia-cudnn-cu12", "nvidia-cublas", "nvidia-cudnn-cu13", "numpy"]
    assert cuda_libraries.for_two_versions(both) == {
        "nvidia-cudnn": ["nvidia-cudnn-cu12", "nvidia-cudnn-cu13"]
    }
    both = ["nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cusparse-cu12"]
    assert list(cuda_libraries.for_two_versions(both)) == ["nvidia-cublas"]
    assert not cuda_libraries.for_two_versions(
        ["nvidia-cusparse", "nvidia-cusparselt-cu13", "nvidia-nvjitlink"]
    )


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == mvc_jax.__version__
    assert "arXiv:2412.15358" in str(cited["preferred-citation"])
    newest = re.search(
        r"(?m)^## .*?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text()
    )
    assert newest[1] == mvc_jax.__version__


def build(folder, what):
    """Builds a distribution of the project in a folder; returns its file."""
    code = f"from setuptools import build_meta; build_meta.build_{what}('dist')"
    (folder / "dist").mkdir(exist_ok=True)
    command = [sys.executable, "-I", "-c", code]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    suffix = {"sdist": "*.tar.gz", "wheel": "*.whl"}[what]
    return next((folder / "dist").glob(suffix))


def test_a_wheel_of_the_source_distribution_has_every_file(tmp_path):
    """Modules, configs, templates and tables: what runs anywhere."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("mvc_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    wanted = {
        path.relative_to(tmp_path).as_posix()
        for name in ("mvc_jax", "configs")
        for path in (tmp_path / name).rglob("*")
        if path.is_file()
    }
    wanted.remove("mvc_jax/configs.py")  # which finds them in a checkout
    with tarfile.open(build(tmp_path, "sdist")) as file:
        file.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    with zipfile.ZipFile(build(source, "wheel")) as wheel:
        found = {x for x in wheel.namelist() if ".dist-info/" not in x}
        text = wheel.read(next(x for x in wheel.namelist() if "entry_points" in x))
    found.discard("mvc_jax/configs.py")
    assert found == {
        x.replace("configs/", "mvc_jax/configs/", 1) if x[0] == "c" else x
        for x in wanted
    }
    assert b"mvc-jax = mvc_jax.train:main" in text


@pytest.fixture
def said(monkeypatch):
    """What `start` logs, by level; JAX itself was started before."""
    rows = collections.defaultdict(list)
    monkeypatch.setattr(logging, "info", lambda *x: rows["info"].append(x[0] % x[1:]))
    monkeypatch.setattr(
        logging, "warning", lambda *x: rows["warning"].append(x[0] % x[1:])
    )
    monkeypatch.setattr("jax.monitoring.register_event_duration_secs_listener", id)
    runtime.start.cache_clear()
    yield rows
    runtime.start.cache_clear()


def install(folder, *names):
    for name in names:
        (folder / f"{name}.dist-info").mkdir()


def test_the_start_says_which_cudnn_was_loaded(said, monkeypatch, tmp_path):
    runtime.start()
    assert "cuDNN" not in said["info"][-1] and not said["warning"]

    def load(name, mode):
        assert name == "libcudnn.so.9" and mode & os.RTLD_NOLOAD
        return types.SimpleNamespace(cudnnGetVersion=Version())

    class Version:
        def __call__(self):
            return 92600

    monkeypatch.setattr(ctypes, "CDLL", load)
    runtime.start.cache_clear()
    runtime.start()
    assert said["info"][-1].endswith("; cuDNN 9.26.0")


def test_the_start_warns_of_two_versions_of_cuda(said, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    install(tmp_path, "nvidia_cudnn_cu13-9.26.0.51", "nvidia_nccl_cu13-2.30.7")
    runtime.start()
    assert not said["warning"]
    install(tmp_path, "nvidia_cudnn_cu12-9.28.0.42", "nvidia_cublas_cu12-12.9.3.13")
    runtime.start.cache_clear()
    runtime.start()
    (warning,) = said["warning"]
    assert "nvidia-cudnn-cu12 and nvidia-cudnn-cu13." in warning
    assert "nccl" not in warning and "cublas" not in warning


def test_the_start_warns_of_a_missing_driver(said, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(cuda_libraries, "has_driver", lambda: False)
    install(tmp_path, "jax_cuda13_plugin-0.10.2")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    runtime.start()
    assert not said["warning"]
    monkeypatch.delenv("JAX_PLATFORMS")
    runtime.start.cache_clear()
    runtime.start()
    assert "no libcuda.so.1" in said["warning"][0]


def test_without_a_driver_jax_asks_no_library_for_its_version(monkeypatch):
    """CUPTI 13.2 crashes then, and with it a run that would take the CPU."""
    name = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(cuda_libraries, "has_driver", lambda: True)
    runtime.set_up("")
    assert name not in os.environ
    monkeypatch.setattr(cuda_libraries, "has_driver", lambda: False)
    runtime.set_up("")
    assert os.environ[name] == "1"
