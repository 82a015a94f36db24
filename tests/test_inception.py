"""The feature space of the FID: torch-fidelity's own network, on random weights.

The library and torchvision, which it imports, are installed by launch/test.sh into a
folder of their own: transformers would import a torchvision that is beside it. What
needs them runs in one process, which prints what it found.
"""

import json
import os
import pathlib
import pickle
import subprocess
import sys

import pytest

from mvc_jax.errors import UserError
from mvc_jax.metrics import feature_spaces, inception

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARY = pathlib.Path(sys.prefix) / "torch-fidelity"


def measure(folder: str) -> dict:
    """Runs the network by the library and by us; returns what the tests compare."""
    import numpy as np
    import readers

    declared = readers.declare_operators_of_torchvision()
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as library
    from torch_fidelity import metric_fid

    from mvc_jax.metrics import moments, points

    path = pathlib.Path(folder)
    made = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = library.FeatureExtractorInceptionV3
        load, library.load_state_dict_from_url = (
            library.load_state_dict_from_url,
            lambda *args, **kwargs: made,
        )
        network.load_state_dict = lambda self, state: None
        theirs = network("inception", ["2048"])
        del network.load_state_dict
        library.load_state_dict_from_url = load
        for weights in theirs.parameters():
            if weights.ndim == 4:
                torch.nn.init.kaiming_normal_(weights, nonlinearity="relu")
    torch.save(theirs.state_dict(), path / "random.pth")
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), np.uint8)
    with torch.inference_mode():
        (wanted,) = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    space = feature_spaces.load("inception", str(path / "random.pth"), batch=2)
    found = space.embed(list(images))
    few = [wanted.numpy()[:, k : k + 3] for k in (0, 3)]
    statistics = [{"mu": x.mean(axis=0), "sigma": np.cov(x, rowvar=False)} for x in few]
    fid = metric_fid.fid_statistics_to_metric(*statistics, False)
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, path / "torchvision.pth")
    (path / "code.pth").write_bytes(pickle.dumps(Dangerous(str(path / "ran"))))
    (path / "cut.pth").write_bytes((path / "random.pth").read_bytes()[:5000])
    refused = {}
    for name in ("torchvision", "code", "cut"):
        try:
            feature_spaces.load("inception", str(path / f"{name}.pth"), batch=2)
        except UserError as error:
            refused[name] = str(error)
    del declared
    return {
        "difference": float(np.abs(found - wanted.numpy()).max()),
        "size": float(wanted.std()),
        "shape": list(found.shape),
        "none": list(space.embed([]).shape),
        "published": space.published,
        "fid": float(fid["frechet_inception_distance"]),
        "ours": moments.frechet_distance(*(points.Points(x) for x in few)),
        "refused": refused,
        "code_ran": (path / "ran").exists(),
    }


def main(folder: str):
    """Of the process that has the library."""
    print(json.dumps(measure(folder)))


class Dangerous:
    """What a file of weights may hold: a call."""

    def __init__(self, path: str):
        self._path = path

    def __reduce__(self):
        return (open, (self._path, "w"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    if not LIBRARY.is_dir():
        pytest.fail(f"no torch-fidelity in {LIBRARY}: bash launch/test.sh installs it")
    folder = tmp_path_factory.mktemp("inception")
    places = [ROOT, ROOT / "tests", ROOT / "tests" / "consumers", LIBRARY]
    paths = os.pathsep.join(map(str, places))
    code = "import sys, test_inception; test_inception.main(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_features_are_the_library_s(measured):
    assert measured["shape"] == [3, inception.DIMS]
    assert measured["none"] == [0, inception.DIMS]
    assert measured["size"] > 1e-3
    assert measured["difference"] < 1e-4 * measured["size"]


def test_the_frechet_distance_is_the_library_s(measured):
    assert measured["ours"] == pytest.approx(measured["fid"], rel=1e-4)


def test_only_the_published_weights_make_an_fid(measured):
    assert measured["published"] is False


def test_other_files_are_refused_and_run_no_code(measured):
    assert "no fc.weight of 1008 x 2048" in measured["refused"]["torchvision"]
    assert "UnpicklingError" in measured["refused"]["code"]
    assert "Download" in measured["refused"]["cut"]
    assert not measured["code_ran"]


def test_what_is_missing_is_said_before_the_work(monkeypatch, tmp_path):
    found = inception.importlib.util.find_spec
    absent = {"torchvision", "torch_fidelity"}
    for missing in (absent, set()):
        monkeypatch.setattr(
            inception.importlib.util,
            "find_spec",
            lambda name, missing=missing: (
                None if name in missing else found("json") or found(name)
            ),
        )
        words = r"\.\[inception\]" if missing else "no file"
        with pytest.raises(UserError, match=words):
            feature_spaces.check("inception", str(tmp_path / "weights.pth"))
