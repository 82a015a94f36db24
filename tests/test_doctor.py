"""`mvc-jax doctor`: what is missing is said, and by whom it is wanted."""

import importlib.metadata

import pytest

from mvc_jax import train
from mvc_jax.command import doctor
from mvc_jax.errors import UserError
from mvc_jax.training import runtime

REQUIRED = ("numpy>=2", "jax[cuda13]; extra == 'cuda'", "nobody>=1; extra == 'medical'")


@pytest.fixture
def machine(monkeypatch):
    """A machine with two GPUs, and a project that asks for `REQUIRED`."""

    def requires(name):
        return REQUIRED if name == "mvc_jax" else []

    class Metadata:
        def get_all(self, name):
            assert name == "Provides-Extra"
            return ["cuda", "medical"]

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: Metadata())
    found = runtime.Devices("a GPU", 2, 3 * 2**30)
    monkeypatch.setattr(runtime, "ask_devices", lambda: found)
    return monkeypatch


def rows(capsys):
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line}


def test_it_says_what_is_there_and_what_is_missing(machine, capsys):
    assert train.main(["mvc-jax", "doctor"]) == 0
    found = rows(capsys)
    assert found["devices"] == "2 x a GPU, 3 GiB in all"
    assert found["packages"] == "all 1 that are required"
    assert found["medical"].startswith("missing caption: DICOM")
    assert "free" in found["memory"] and "compiled" in found["programs"]


def test_an_old_version_and_no_device_are_faults(machine, capsys):
    machine.setattr(importlib.metadata, "version", lambda name: "1.0")
    assert train.main(["mvc-jax", "doctor"]) == 2
    assert "wanted numpy>=2 (1.0 is installed)" in rows(capsys)["packages"]
    machine.undo()

    def refuse():
        raise UserError(
            "config.mesh", wanted="devices", got="a crash", fix="Repair it."
        )

    machine.setattr(runtime, "ask_devices", refuse)
    assert train.main(["mvc-jax", "doctor"]) == 2
    assert "a crash. Repair it." in rows(capsys)["devices"]


def test_a_copy_that_is_not_installed(machine, capsys):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    machine.setattr(importlib.metadata, "requires", requires)
    assert doctor.run(["mvc-jax", "doctor"]) == 0
    assert "not installed" in rows(capsys)["packages"]


def test_help_and_a_mistake(capsys):
    assert train.main(["mvc-jax", "doctor", "--help"]) == 0
    assert "mvc-jax doctor" in capsys.readouterr().out
    assert train.main(["mvc-jax", "doctor", "all"]) == 2
    assert "doctor: wanted no argument, got all" in capsys.readouterr().err
