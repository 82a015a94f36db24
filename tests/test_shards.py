"""Arrays in shards: interrupted or damaged, they end with the same bytes."""

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax import files
from mvc_jax.data import shards
from mvc_jax.errors import UserError

ROW = (2, 3)
DTYPES = ("float32", "float16")


class Killed(BaseException):
    """Simulates SIGKILL, where a whole process would be slow."""


def an_array(rows, dtype="float32"):
    array = np.random.default_rng(rows).normal(size=(rows, *ROW))
    return array.astype(dtype)


def fill(folder, array):
    writer = shards.Writer(
        folder, rows=len(array), row_shape=array.shape[1:], dtype=array.dtype.name
    )
    made = writer.missing
    for rows in made:
        writer.write(rows, array[rows.start : rows.stop])
    return made


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if not path.name.startswith(".tmp-")  # which the stage removes when it opens
    }


@contextlib.contextmanager
def rows_per_shard(count, dtype="float32"):
    size = count * int(np.prod(ROW)) * np.dtype(dtype).itemsize
    with mock.patch.object(shards, "SHARD_BYTES", size):
        yield


@contextlib.contextmanager
def killed_at(write, *, after):
    """Raises `Killed` at the `write`-th file, before or `after` it is renamed."""
    replacing, count = files.replacing, 0

    @contextlib.contextmanager
    def killed(path):
        nonlocal count
        count += 1
        with replacing(path) as temporary:
            yield temporary
            if count == write and not after:
                raise Killed
        if count == write:
            raise Killed

    with mock.patch.object(files, "replacing", killed), contextlib.suppress(Killed):
        yield


def damage(path, how, where=0.5):
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:  # one bit
        at = int(where * (len(content) - 1))
        flipped = bytes([content[at] ^ 1])
        path.write_bytes(content[:at] + flipped + content[at + 1 :])


@given(
    rows=st.integers(1, 9),
    per_shard=st.integers(1, 10),
    dtype=st.sampled_from(DTYPES),
    kills=st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=3),
    damages=st.lists(
        st.tuples(
            st.integers(0, 10),
            st.sampled_from(["delete", "truncate", "flip"]),
            st.floats(0, 1),
        ),
        max_size=2,
    ),
)
@settings(deadline=None, max_examples=100)
def test_interrupted_and_damaged_anywhere_the_final_bytes_are_the_same(
    rows, per_shard, dtype, kills, damages
):
    array = an_array(rows, dtype)
    with tempfile.TemporaryDirectory() as folder, rows_per_shard(per_shard, dtype):
        whole, cut = (files.epath.Path(folder) / name for name in ("whole", "cut"))
        fill(whole, array)
        for write, after in kills:
            with killed_at(write, after=after):
                fill(cut, array)
            there = sorted(cut.iterdir()) if cut.exists() else []
            for which, how, where in damages:
                if which < len(there) and there[which].exists():
                    damage(there[which], how, where)
        fill(cut, array)
        assert digests(cut) == digests(whole)
        assert fill(cut, array) == []
        np.testing.assert_array_equal(shards.Shards(cut).take(np.arange(rows)), array)


@given(
    rows=st.integers(1, 12),
    per_shard=st.integers(1, 13),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@settings(deadline=None, max_examples=50)
def test_rows_come_in_any_order_with_repeats(rows, per_shard, dtype, data):
    array = an_array(rows, dtype)
    indices = np.asarray(data.draw(st.lists(st.integers(0, rows - 1))), np.int64)
    with tempfile.TemporaryDirectory() as folder, rows_per_shard(per_shard, dtype):
        fill(folder, array)
        read = shards.Shards(folder)
        assert (len(read), read.shape) == (rows, array.shape)
        taken = read.take(indices)
        assert taken.dtype == read.dtype == array.dtype
        np.testing.assert_array_equal(taken, array[indices])
        for outside in (-1, rows):
            with pytest.raises(IndexError, match=f"rows 0 to {rows - 1}"):
                read.take(np.array([outside]))


PROGRAM = """
import sys, time
import numpy as np
from mvc_jax.data import shards
shards.SHARD_BYTES = 2 << 20
writer = shards.Writer(sys.argv[1], rows=64, row_shape=(1 << 17,), dtype="float32")
for rows in writer.missing:
    shape = (len(rows), 1 << 17)
    array = np.random.default_rng(rows.start).random(shape, np.float32)
    print(rows, flush=True)
    writer.write(rows, array)
"""


def test_a_writer_killed_by_sigkill_resumes(tmp_path):
    """32 MiB in 16 shards; killed as it writes its third, at a random moment."""
    draw = np.random.default_rng(seed := time.time_ns() % 1000)
    print(f"delays drawn from seed {seed}")
    folders = [tmp_path / name for name in ("whole", "cut")]
    subprocess.run([sys.executable, "-c", PROGRAM, folders[0]], check=True)
    for _ in range(3):
        command = [sys.executable, "-c", PROGRAM, folders[1]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        for _ in range(3):
            assert process.stdout.readline()
        time.sleep(draw.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folders[1]], capture_output=True, check=True
    )
    assert len(done.stdout.splitlines()) <= 16 - 3 * 2  # complete shards were kept
    assert digests(folders[1]) == digests(folders[0])
    shards.Shards(folders[1]).verify()


def test_only_a_damaged_shard_is_written_again(tmp_path, caplog):
    with rows_per_shard(2):
        fill(tmp_path, an_array(7))
        before = digests(tmp_path)
        damage(tmp_path / "00001.npy", "flip")
        assert fill(tmp_path, an_array(7)) == [range(2, 4)]
    assert f"{tmp_path / '00001.npy'} is damaged" in caplog.text
    assert digests(tmp_path) == before


def test_shards_of_another_array_are_not_used(tmp_path, caplog):
    with rows_per_shard(2):
        fill(tmp_path, an_array(7))
        fill(tmp_path, an_array(8))
    assert "another array" in caplog.text
    np.testing.assert_array_equal(
        shards.Shards(tmp_path).take(np.arange(8)), an_array(8)
    )


def test_missing_bytes_are_those_of_the_missing_rows(tmp_path):
    with rows_per_shard(3):
        writer = shards.Writer(tmp_path, rows=8, row_shape=ROW, dtype="float16")
        seen = [writer.missing_bytes]
        for rows in writer.missing:  # 24 bytes of float32 hold twice as many
            writer.write(rows, np.zeros((len(rows), *ROW), "float16"))
            seen.append(writer.missing_bytes)
    assert seen == [8 * 12, 2 * 12, 0]
    assert sorted(writer.names) == sorted(
        f"{tmp_path.name}/{name}" for name in digests(tmp_path)
    )


@pytest.mark.parametrize("how, got", [("delete", "no file"), ("truncate", "bytes")])
def test_opening_refuses_missing_and_truncated_shards(tmp_path, how, got):
    folder = tmp_path / "encode" / "moments"
    with rows_per_shard(2):
        fill(folder, an_array(5))
    damage(folder / "00002.npy", how)
    with pytest.raises(UserError, match="[Rr]un the stage encode again") as error:
        shards.Shards(folder)
    assert error.value.name == str(folder / "00002.npy")
    assert got in str(error.value)


def test_opening_refuses_an_incomplete_array(tmp_path):
    with rows_per_shard(2), killed_at(4, after=True):
        fill(tmp_path, an_array(5))
    with pytest.raises(UserError, match="00001.npy.*not written yet"):
        shards.Shards(tmp_path)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"shards": []}', "flip"])
def test_a_missing_or_damaged_index_is_one_sentence(tmp_path, content):
    fill(tmp_path, an_array(5))
    path = tmp_path / "index.json"
    if content == "flip":
        content = json.dumps(json.loads(path.read_text()) | {"rows_per_shard": 1})
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match="index.json.*un the stage"):
        shards.Shards(tmp_path)
    fill(tmp_path, an_array(5))
    shards.Shards(tmp_path).verify()


def test_verifying_finds_one_flipped_bit(tmp_path):
    with rows_per_shard(2):
        fill(tmp_path, an_array(5))
    read = shards.Shards(tmp_path)
    read.verify()
    damage(tmp_path / "00001.npy", "flip")
    shards.Shards(tmp_path)  # the size is right
    with pytest.raises(UserError, match="00001.npy.*Delete it and run the stage"):
        read.verify()


READER = """
import json, resource, sys
import numpy as np
from mvc_jax.data import shards
def mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = mib()
read = shards.Shards(sys.argv[1])
rows = read.take(np.random.default_rng(0).integers(len(read), size=50))
print(json.dumps([*read.shape, float(rows.max()), mib() - before]))
"""


def test_a_cache_larger_than_memory_is_read_row_by_row(tmp_path):
    """200,000 images at 64x64 latents, 26 GB, in sparse files."""
    shape, per_shard = (64, 64, 8), shards.SHARD_BYTES // (64 * 64 * 8 * 4)
    index = {"rows": 200_000, "row_shape": shape, "dtype": "float32"}
    index |= {"rows_per_shard": per_shard, "shards": []}
    for shard, start in enumerate(range(0, 200_000, per_shard)):
        path = tmp_path / f"{shard:05d}.npy"
        count = min(per_shard, 200_000 - start)
        np.lib.format.open_memmap(path, "w+", np.float32, (count, *shape)).flush()
        index["shards"].append({"bytes": path.stat().st_size, "sha256": ""})
    (tmp_path / "index.json").write_text(json.dumps(index))
    stored = sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512
    assert stored < 64 << 20 < 26e9 < sum(s["bytes"] for s in index["shards"])
    done = subprocess.run(
        [sys.executable, "-c", READER, tmp_path], capture_output=True, check=True
    )
    *read, largest, mib = json.loads(done.stdout)
    assert (read, largest) == ([200_000, *shape], 0.0)
    assert mib < 64  # the rows are 6.25 MiB, twice: mapped, and copied
