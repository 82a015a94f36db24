"""Sources at URLs: the same images as on disk, from servers that speak plain HTTP, the
Hugging Face hub's protocol and Google's; and what is said where one is missing."""

import dataclasses
import pathlib
import sys
import threading
import types

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import remote_servers
from test_caption import encoded, picture

from mvc_jax import train
from mvc_jax.data import gather, remote
from mvc_jax.data.sources import open_source
from mvc_jax.errors import UserError
from mvc_jax.training import runtime

SERVERS = {  # protocol -> its server, and the URL of a data set there
    "http": (remote_servers.Web, "{}/me/parts"),
    "hf": (remote_servers.Hub, "hf://datasets/me/parts"),
    "gs": (remote_servers.Bucket, "gs://me/parts"),
}


@dataclasses.dataclass
class Place:
    """A data set on disk, and on a server of it.

    Attributes:
      protocol: a key of `SERVERS`.
      folder: on disk.
      url: on the server.
      server: of the folder.
    """

    protocol: str
    folder: pathlib.Path
    url: str
    server: remote_servers.Server


@pytest.fixture(params=SERVERS)
def place(request, tmp_path, monkeypatch):
    """A data set without files; no client waits before it tries again."""
    handler, url = SERVERS[request.param]
    folder = tmp_path / "served" / "me" / "parts"
    folder.mkdir(parents=True)
    monkeypatch.setattr(remote, "_WAITS", (0, 0))
    with remote_servers.serve(tmp_path / "served", handler) as server:
        if request.param == "hf":
            use_hub(monkeypatch, server.url)
        if request.param == "gs":
            use_google(monkeypatch, server.url)
        forget(request.param)
        yield Place(request.param, folder, url.format(server.url), server)
        forget(request.param)


def use_hub(monkeypatch, url):
    """What HF_ENDPOINT does when the library is imported."""
    from huggingface_hub import constants, file_download

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    template = template.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    # As a test of another library may have found it at its import.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    patient = types.SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", patient)


def use_google(monkeypatch, url):
    # Else it asks Google, by gRPC, what kind of bucket it is.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)

    async def sleep(seconds):
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=sleep))


def forget(protocol):
    """Makes fsspec forget the servers and lists of a protocol, and the hub a session.

    A session that began offline stays so.
    """
    fsspec.get_filesystem_class(protocol).clear_instance_cache()
    if protocol == "hf":
        from huggingface_hub.utils import _http

        _http.reset_sessions()


def add_images(folder, parts=("seg_train", "seg_test"), count=2):
    """Class folders of distinct images, under names that URLs must quote."""
    for k, part in enumerate(parts):
        for j, name in enumerate(("hex nut", "M2.5 + 50% é#1")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                content = encoded(picture(1000 * k + 100 * j + i, size=(6, 4)))
                (folder / part / name / f"{i} a.png").write_bytes(content)


def add_parquet(folder):
    for k, part in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test")):
        images = [encoded(picture(10 * k + i, size=(6, 4))) for i in range(4)]
        table = pa.table({"image": images, "label": list("abab")})
        (folder / "data").mkdir(exist_ok=True)
        pq.write_table(table, folder / "data" / f"{part}.parquet", row_group_size=2)


def equal(ours, theirs):
    assert ours.ids == theirs.ids and ours.class_names == theirs.class_names
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_array_equal(ours.is_test, theirs.is_test)
    for k in range(len(ours)):
        np.testing.assert_array_equal(ours[k]["image"], theirs[k]["image"])


def test_a_folder(place):
    add_images(place.folder)
    ours = open_source(f"folder:{place.url}")
    equal(ours, open_source(f"folder:{place.folder}"))
    assert len(ours) == 8 and ours.is_remote
    answers = 2 if place.protocol == "hf" else 1  # the hub sends readers elsewhere
    assert sum("png" in path for path in place.server.asked) == answers * len(ours)


def test_parquet(place):
    add_parquet(place.folder)
    local = open_source(f"parquet:{place.folder}")
    equal(open_source(f"parquet:{place.url}"), local)
    equal(open_source(f"parquet:{place.url}/**/*.parquet"), local)
    one = open_source(f"parquet:{place.url}/data/train-00001-of-00002.parquet")
    assert len(one) == 4
    if place.protocol == "http":
        query = f"{place.url}/data/train-00001-of-00002.parquet?download=true"
        equal(open_source(f"parquet:{query}"), one)
    (place.folder / "data" / "train-00001-of-00002.parquet").unlink()
    forget(place.protocol)
    with pytest.raises(UserError, match="got no such file"):
        open_source(f"parquet:{place.url}")


def test_a_folder_that_holds_the_others_again(place):
    """They are compared by what the server lists of them, where it does."""
    add_images(place.folder, parts=("seg_train", "seg_test", "again/seg_train"))
    for path in (place.folder / "seg_test").rglob("*.png"):
        inside = path.relative_to(place.folder)
        (place.folder / "again" / inside).parent.mkdir(parents=True, exist_ok=True)
        (place.folder / "again" / inside).write_bytes(path.read_bytes())
    for path in (place.folder / "seg_train").rglob("*.png"):
        inside = path.relative_to(place.folder)
        (place.folder / "again" / inside).write_bytes(path.read_bytes())
    ours = open_source(f"folder:{place.url}")
    assert len(ours) == 8 and "same 8 images" in ours.remarks[0]
    if place.protocol != "http":
        assert not any("png" in path for path in place.server.asked)


def test_many_images_are_asked_for_at_a_time(place):
    """Each answer waits until eight are asked for."""
    add_images(place.folder, parts=("train",), count=16)
    source = open_source(f"folder:{place.url}")
    place.server.together = threading.Barrier(8, timeout=20)
    options = gather.ReaderOptions(8)
    found = list(gather.read_images(source, range(len(source)), options))
    assert [image is not None for _, image, _ in found] == [True] * 32


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize("fault", [503, "cut"])
def test_what_fails_in_passing_is_tried_again(place, kind, fault):
    (add_images if kind == "folder" else add_parquet)(place.folder)
    place.server.faults = {".p": [fault, fault, None]}
    if place.protocol != "http":  # whose lists have a length, too
        lists = "tree" if place.protocol == "hf" else "/o"
        place.server.faults[lists] = [503, None]
    equal(open_source(f"{kind}:{place.url}"), open_source(f"{kind}:{place.folder}"))
    assert {len(left) for left in place.server.faults.values()} == {1}


def test_a_list_that_breaks_off_is_not_taken_for_all(place, monkeypatch):
    add_images(place.folder)
    second = {"http": "hex", "hf": "tree", "gs": "/o"}[place.protocol]
    place.server.faults = {second: [None, 503]}  # the first page is answered
    with pytest.raises(UserError, match="Check the connection"):
        open_source(f"folder:{place.url}")
    place.server.faults = {}
    assert len(open_source(f"folder:{place.url}")) == 8


@pytest.fixture
def run(place, tmp_path, monkeypatch, capfd):
    """Runs `caption` on the data set; returns (exit code, terminal, its folder)."""
    monkeypatch.setattr(runtime, "set_up", lambda folder: None)

    def run_(kind, name="", *flags):
        words = [
            "train",
            "--config=configs/folder.py:path=nowhere",
            f"--config.data.source={kind}:{place.url}{name}",
            f"--workdir={tmp_path / 'run'}",
            "--config.stages=caption",
            "--config.data.size=8",
            *flags,
        ]
        code = train.main(words)
        captured = capfd.readouterr()
        return code, captured.out + captured.err, tmp_path / "run"

    return run_


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_missing_name_and_no_credentials(place, run, kind):
    code, output, _ = run(kind, "/nowhere")
    assert code == 2 and "config.data.source" in output
    assert "Traceback" not in output and output.count("wanted") == 1
    (add_images if kind == "folder" else add_parquet)(place.folder)
    place.server.locked = True
    forget(place.protocol)
    code, output, workdir = run(kind)
    assert code == 2 and "Sign in" in output and not (workdir / "caption").exists()
    assert "Traceback" not in output and output.count("wanted") == 1
    login = {"hf": "hf auth login", "gs": "gcloud auth application-default login"}
    assert login.get(place.protocol, "Sign in, or") in output


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_connection_that_breaks_for_good(place, run, kind):
    """It is not a bad image, which a run may skip; nothing half-written stays."""
    (add_images if kind == "folder" else add_parquet)(place.folder)
    skip = "--config.data.on_bad_image=skip"
    name = "1 a.png" if kind == "folder" else "test.parquet"
    place.server.faults = {name: ["cut"]}
    code, output, workdir = run(kind, "", skip)
    assert code == 2 and "Check the connection and run the same command" in output
    assert "Traceback" not in output and output.count("wanted") == 1
    assert not [*workdir.glob("caption/*")]
    place.server.faults = {}
    code, output, workdir = run(kind, "", skip)
    assert code == 0, output
    assert (workdir / "caption" / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_protocol_that_nothing_reads(kind, monkeypatch):
    with pytest.raises(UserError, match="protocol that fsspec knows"):
        open_source(f"{kind}:foo://bucket/data")
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UserError, match="pip install adlfs"):
        open_source(f"{kind}:az://bucket/data")
