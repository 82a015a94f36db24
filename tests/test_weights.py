"""safetensors files: read and written, damaged, split, and within memory."""

import json
import pathlib
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.checkpoints import tensor_file, weights
from mvc_jax.errors import UserError
from mvc_jax.training import sharding

ROOT = pathlib.Path(__file__).resolve().parents[1]
INDEX = "model.safetensors.index.json"


def tree(seed=0, dtype=np.float32):
    """Every kind of leaf: convolution, linear layer, norm, embedding, bias."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    return {
        "conv_in": {"kernel": draw(3, 3, 4, 8), "bias": draw(8)},
        "blocks_0": {"norm": {"scale": draw(8), "bias": draw(8)}},
        "proj": {"kernel": draw(8, 5)},
        "tokens": {"embedding": draw(7, 8)},
    }


def as_read(params):
    """Embeddings are fp32: Flax's CLIP adds them up as they are."""
    table = params["tokens"]["embedding"].astype(np.float32)
    return {**params, "tokens": {"embedding": table}}


def shapes(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def stored(params):
    """The tensors of a tree under their names in a file, in their own precision."""
    return {
        "conv_in.weight": params["conv_in"]["kernel"].transpose(3, 2, 0, 1).copy(),
        "conv_in.bias": params["conv_in"]["bias"],
        "blocks.0.norm.weight": params["blocks_0"]["norm"]["scale"],
        "blocks.0.norm.bias": params["blocks_0"]["norm"]["bias"],
        "proj.weight": params["proj"]["kernel"].T.copy(),
        "tokens.weight": params["tokens"]["embedding"],
    }


def assert_equal(a, b):
    def same(x, y):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)

    jax.tree.map(same, a, b)


@pytest.fixture
def file(tmp_path):
    weights.write(tmp_path / "model.safetensors", tree())
    return tmp_path / "model.safetensors"


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def split(folder, tensors, place):
    """Writes shards and their index; `place`: name -> number of its shard."""
    weight_map = {
        name: f"model-{place(name):05}-of-00002.safetensors" for name in tensors
    }
    for shard in sorted(set(weight_map.values())):
        part = {k: v for k, v in tensors.items() if weight_map[k] == shard}
        safetensors.numpy.save_file(part, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder / INDEX


def in_two(name):
    return 1 + (name > "c")


def test_the_bytes_are_those_of_the_library(file):
    tensors = stored(tree())
    assert file.read_bytes() == safetensors.numpy.save(tensors, {"format": "pt"})
    assert_equal(weights.read(file, shapes(tree())), tree())


def test_pytorch_reads_what_is_written(torch, file):
    import safetensors.torch

    read = safetensors.torch.load_file(file)
    for name, tensor in stored(tree()).items():
        np.testing.assert_array_equal(read[name].numpy(), tensor)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_stored_precision_is_kept_and_written_as_fp32(tmp_path, dtype):
    params = tree(dtype=dtype)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(stored(params), path)
    read = weights.read(path, shapes(params))
    assert_equal(read, as_read(params))
    assert weights.check(path) == np.dtype(dtype).name
    weights.write(path, read)
    assert_equal(
        weights.read(path, shapes(params)),
        jax.tree.map(lambda x: x.astype(np.float32), params),
    )


def test_leaves_are_writable_and_share_no_memory(file):
    read = jax.tree.leaves(weights.read(file, shapes(tree())))
    for leaf in read:
        leaf += 1
        assert leaf.flags.c_contiguous
    assert not any(np.shares_memory(a, b) for i, a in enumerate(read) for b in read[:i])


def test_arrays_split_over_devices_are_written_whole(file, tmp_path):
    mesh = sharding.make_mesh(2, 4)
    params = jax.device_put(tree(), sharding.tree_shardings(tree(), mesh))
    assert not params["proj"]["kernel"].is_fully_replicated
    weights.write(tmp_path / "sharded", params)
    assert (tmp_path / "sharded").read_bytes() == file.read_bytes()
    weights.write(tmp_path / "half", {"a": {"bias": jnp.bfloat16(0.5)}})
    read = safetensors.numpy.load_file(tmp_path / "half")
    assert read["a.bias"] == np.float32(0.5)
    assert read["a.bias"].shape == ()


def test_shards_are_one_checkpoint(tmp_path):
    index = split(tmp_path, stored(tree()), in_two)
    assert len(set(json.loads(index.read_text())["weight_map"].values())) == 2
    assert_equal(weights.read(index, shapes(tree())), tree())


def test_every_missing_shard_is_named(tmp_path):
    index = split(tmp_path, stored(tree()), in_two)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(UserError) as error:
        weights.check(index)
    for number in (1, 2):
        assert f"model-0000{number}-of-00002.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m | {"ghost": m["proj.weight"]}, "ghost"),
        (lambda m: m | {"proj.weight": m["conv_in.bias"]}, "proj.weight"),
    ],
)
def test_a_tensor_that_its_shard_lacks_is_named(tmp_path, change, named):
    index = split(tmp_path, stored(tree()), lambda name: 1 + (name == "proj.weight"))
    content = json.loads(index.read_text())
    content["weight_map"] = change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{named} \\(not in model-0000"):
        weights.read(index, shapes(tree()))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
    ],
)
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UserError, match=INDEX):
        weights.check(tmp_path / INDEX)


def test_what_differs_is_listed_below_one_sentence_with_its_count(file):
    wanted = shapes(tree())
    wanted["conv_in"]["kernel"] = jax.ShapeDtypeStruct((3, 3, 8, 8), np.float32)
    wanted["extra"] = {"bias": jax.ShapeDtypeStruct((1,), np.float32)}
    del wanted["blocks_0"]
    with pytest.raises(UserError, match="got 4 that differ") as error:
        weights.read(file, wanted)
    assert sorted(error.value.details) == [
        "blocks.0.norm.bias is unexpected",
        "blocks.0.norm.weight is unexpected",
        "conv_in.weight has shape [3, 3, 4, 8], not [3, 3, 8, 8]",
        "extra.bias is missing",
    ]


def test_a_kernel_of_three_by_three_is_no_linear_layer(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a.weight": np.zeros((5, 4, 3, 3), np.float32)}, path)
    wanted = {"a": {"kernel": jax.ShapeDtypeStruct((4, 5), np.float32)}}
    with pytest.raises(
        UserError, match=r"a.weight has shape \[3, 3, 4, 5\], not \[4, 5\]"
    ):
        weights.read(path, wanted)


def test_a_tensor_under_an_old_and_a_new_name_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    names = ("x.attentions.0.query.weight", "x.attentions.0.to_q.weight")
    safetensors.numpy.save_file({n: np.zeros((2, 2), np.float32) for n in names}, path)
    wanted = {"kernel": jax.ShapeDtypeStruct((2, 2), np.float32)}
    with pytest.raises(UserError, match=r"to_q.weight appears twice"):
        weights.read(path, {"x": {"attentions_0": {"query": wanted}}})


def test_a_constant_of_older_exports_is_passed_over_whatever_its_dtype(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = stored(tree(dtype=np.float16))
    tensors["text_model.embeddings.position_ids"] = np.arange(7)[None]
    safetensors.numpy.save_file(tensors, path)
    assert weights.check(path) == "float16"
    read = weights.read(path, shapes(tree()))
    assert_equal(read, as_read(tree(dtype=np.float16)))


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"proj.weight": np.float16}, "5 F32, 1 F16: proj.weight is F16"),
        ({"proj.weight": np.int8}, "5 F32, 1 I8: proj.weight is I8"),
        ({"proj.weight": np.float64}, "5 F32, 1 F64: proj.weight is F64"),
        (dict.fromkeys(stored(tree()), ml_dtypes.float8_e4m3fn), "6 F8_E4M3: "),
    ],
)
def test_mixed_and_quantised_precisions_are_named(tmp_path, dtypes, message):
    path = tmp_path / "model.safetensors"
    tensors = {k: v.astype(dtypes.get(k, v.dtype)) for k, v in stored(tree()).items()}
    safetensors.numpy.save_file(tensors, path)
    for refuse in (weights.check, lambda path: weights.read(path, shapes(tree()))):
        with pytest.raises(UserError) as error:
            refuse(path)
        assert message in str(error.value)


def entry(**fields):
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fields}


DAMAGED = {
    "empty": (lambda b: b"", "0 bytes: half-downloaded.*header too small"),
    "three bytes": (lambda b: b[:3], "3 bytes: half-downloaded"),
    "cut in the header": (lambda b: b[:100], "100 bytes: .*invalid header length"),
    "cut in the tensors": (lambda b: b[:-1], "half-downloaded.*not fully covered"),
    "bytes after the end": (lambda b: b + b"x", "damaged.*not fully covered"),
    "zeros": (lambda b: bytes(len(b)), "invalid JSON"),
    "a web page": (lambda b: b"<!DOCTYPE html><html>", "of another kind"),
    "a pickle": (lambda b: b"PK\x03\x04" + bytes(99), "of another kind"),
    "git-lfs": (
        lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git lfs pull",
    ),
    "no JSON": (lambda b: raw(b"{'a'"), "invalid JSON"),
    "no text": (lambda b: raw(b"\xff\xfe"), "invalid UTF-8"),
    "deep": (lambda b: raw(b"[" * 100_000), "invalid JSON"),
    "a list": (lambda b: raw([]), "invalid JSON"),
    "no fields": (lambda b: raw({"a": 1}), "invalid JSON.*TensorInfo"),
    "twice": (
        lambda b: raw(2 * json.dumps(entry()).encode()).replace(b"}{", b", "),
        "half-downloaded",
    ),
    "negative": (lambda b: raw(entry(shape=[-1])), "value: integer `-1`"),
    "true": (lambda b: raw(entry(shape=[True])), "boolean `true`"),
    "size": (lambda b: raw(entry(shape=[2]), b"1234"), "invalid shape, data type"),
    "dtype": (lambda b: raw(entry(dtype="X"), b"1234"), "unknown variant `X`"),
    "backwards": (lambda b: raw(entry(data_offsets=[4, 0])), "damaged"),
    "gap": (
        lambda b: raw(entry(dtype="U8", data_offsets=[1, 2]), b"12"),
        "invalid offset for tensor `a`",
    ),
    "overlap": (
        lambda b: raw(
            {
                "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
            },
            b"123",
        ),
        "invalid offset for tensor `b`",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named_with_the_damage(file, case):
    damage, message = DAMAGED[case]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        weights.check(file)
    assert error.value.name == str(file)


def test_a_path_without_a_file_is_named(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError):
            weights.check(path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    path = tmp_path_factory.mktemp("scratch") / "model.safetensors"
    weights.write(path, tree())
    return path, path.read_bytes()


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_every_damage_ends_in_a_readable_error(scratch, data):
    """Random bytes, headers, cuts and flips of a whole file."""
    path, whole = scratch
    kind = data.draw(st.sampled_from(["bytes", "json", "cut", "flip"]))
    if kind == "bytes":
        content = data.draw(st.binary(max_size=200))
    elif kind == "json":
        leaf = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
        leaf |= st.floats() | st.lists(st.integers(), max_size=3)
        leaf |= st.sampled_from(["F32", "BF16", [1], [0, 4], 2**70])
        fields = st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"])
        entry = st.dictionaries(fields, leaf, max_size=4) | leaf
        header = data.draw(st.dictionaries(st.text(max_size=5), entry, max_size=3))
        content = raw(header, data.draw(st.binary(max_size=8)))
    elif kind == "cut":
        content = whole[: data.draw(st.integers(0, len(whole)))]
    else:
        content = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 600))
            content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        read = weights.read(path, shapes(tree()))
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert jax.tree.map(np.shape, read) == jax.tree.map(np.shape, tree())


def test_what_the_library_refuses_is_refused(scratch):
    """Every cut, and a flip of every byte of the header."""
    path, whole = scratch
    end = 8 + int.from_bytes(whole[:8], "little")
    damaged = [whole[:n] for n in range(0, len(whole), 37)]
    for place in range(end):
        changed = bytearray(whole)
        changed[place] ^= 1
        damaged.append(bytes(changed))
    for content in damaged:
        try:
            safetensors.numpy.load(content)
        except Exception:
            path.write_bytes(content)
            with pytest.raises(UserError):
                weights.check(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(file):
    entries = tensor_file.entries(file)
    file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(UserError, match="changed while it was read"):
        list(tensor_file.tensors(entries))


def test_a_remote_file_is_read_through_a_local_copy(file, monkeypatch):
    """Of a check only its header is fetched."""
    copies = []

    class Remote(type(epath.Path())):
        def __str__(self):
            return "mem://" + super().__str__()

    def local(path):
        copies.append(path)
        return str(file)

    def is_remote(path):
        return str(path).startswith("mem://")

    monkeypatch.setattr(tensor_file.object_store, "is_remote", is_remote)
    monkeypatch.setattr(tensor_file.files, "local", local)
    remote = Remote(file)
    assert tensor_file.entries(remote).keys() == stored(tree()).keys()
    assert not copies
    read = dict(tensor_file.tensors(tensor_file.entries(remote)))
    assert_equal(read, stored(tree()))
    assert len(copies) == 1
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="mem://.*not fully covered"):
        tensor_file.entries(remote)


def test_a_write_that_fails_leaves_the_old_file(file):
    before = file.read_bytes()

    class Leaf:
        shape = (2,)

        def copy(self):
            raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        weights.write(file, {"a": {"bias": np.zeros(2)}, "b": {"bias": Leaf()}})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


PEAK = """
import json, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from mvc_jax.checkpoints import weights
from mvc_jax.training import runtime, sharding

def memory(field):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024

def growth(function):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    result = function()
    return memory("VmHWM") - before, result

path, size = sys.argv[1], int(sys.argv[2])
runtime.set_up("")
keys = [(f"conv_{i}", "kernel") for i in range(16)]
leaf = jax.ShapeDtypeStruct((3, 3, 512, 1024), jnp.float32)
read, params = growth(lambda: weights.read(path, {a: {b: leaf} for a, b in keys}))
assert all(float(params[a][b].min()) == 1 for a, b in keys)

mesh = sharding.make_mesh(1, 8)
make = lambda: {a: {b: jnp.ones((3, 3, 512, 512))} for a, b in keys}
shardings = sharding.tree_shardings(jax.eval_shape(make), mesh)
params = jax.block_until_ready(jax.jit(make, out_shardings=shardings)())
weights.write(path, {"warm": params["conv_0"]})  # what it compiles, it keeps
written, _ = growth(lambda: weights.write(path, params))
print(json.dumps([read / size, written / size]))
"""


def test_reading_and_writing_take_the_tree_and_one_tensor(tmp_path):
    """Reading: 1.3 times the checkpoint at most, here in half precision.

    Writing: nowhere near it; what NumPy fetches must not stay with the JAX arrays.
    """
    path = tmp_path / "model.safetensors"
    tensor = np.ones((1024, 512, 3, 3), np.float16)
    safetensors.numpy.save_file({f"conv.{i}.weight": tensor for i in range(16)}, path)
    size = path.stat().st_size
    assert size > 150e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, path, str(size)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read, written = json.loads(done.stdout)
    assert read < 1.3
    assert written < 0.5
    assert path.stat().st_size == pytest.approx(size, abs=10_000)  # the same, in fp32
