"""Sources at URLs: the same images as on disk, from a server that speaks HTTP."""

import functools
import http.server
import io
import pathlib
import re
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mvc_jax.data.sources import open_source
from mvc_jax.errors import UserError


class Handler(http.server.SimpleHTTPRequestHandler):
    """Lists folders, and serves parts of files as object stores do."""

    def log_message(self, *_):
        pass

    def send_head(self):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return super().send_head()
        content = pathlib.Path(self.translate_path(self.path)).read_bytes()
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        last = min(last, len(content) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        return io.BytesIO(content[first : last + 1])

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


@pytest.fixture
def server(tmp_path):
    """The URL of `tmp_path`."""
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (value, 0, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def equal(ours, theirs):
    assert ours.ids == theirs.ids and ours.class_names == theirs.class_names
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_array_equal(ours.is_test, theirs.is_test)
    for k in range(len(ours)):
        np.testing.assert_array_equal(ours[k]["image"], theirs[k]["image"])


def test_a_folder(tmp_path, server):
    for k, part in enumerate(
        ("seg_train/cat", "seg_train/dog", "seg_test/Cat", "seg_test/dog")
    ):
        (tmp_path / "data" / part).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "data" / part / f"{i}.png").write_bytes(png(10 * k + i))
    equal(open_source(f"folder:{server}/data"), open_source(f"folder:{tmp_path}/data"))


def test_parquet(tmp_path, server):
    for k, part in enumerate(("train-00000-of-00001", "test-00000-of-00001")):
        images = pa.array([png(10 * k + i) for i in range(4)], pa.binary())
        table = pa.table({"image": images, "label": pa.array(list("abab"))})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{part}.parquet", row_group_size=2)
    local = open_source(f"parquet:{tmp_path}/data")
    equal(open_source(f"parquet:{server}/data"), local)
    (tmp_path / "data" / "test-00000-of-00001.parquet").unlink()
    one = open_source(f"parquet:{server}/data/train-00000-of-00001.parquet")
    assert len(one) == 4


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_what_is_not_there(kind, server):
    with pytest.raises(UserError, match="config.data.source"):
        open_source(f"{kind}:{server}/nowhere")
    with pytest.raises(UserError, match="protocol that fsspec knows"):
        open_source(f"{kind}:foo://bucket/data")
    with pytest.raises(UserError, match="pip install gcsfs"):
        open_source(f"{kind}:gs://bucket/data")
