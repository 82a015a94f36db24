"""The cache: resumes anywhere, encodes each image and prompt once, equals the model."""

import functools
import hashlib
import shutil
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from base_folders import to_variant
from many_processes import run_together
from sd_parity import jit_fast

from mvc_jax import encode, errors, files, finetune, processes
from mvc_jax.checkpoints import diffusers_layout
from mvc_jax.configs import common
from mvc_jax.data import captions, shards
from mvc_jax.data.cache import open_cache, pair_rows, read_pairs
from mvc_jax.errors import UserError
from mvc_jax.training import console, rng, sharding
from mvc_jax.training.loop import create_state

N = 11
# Words that the tiny tokenizer knows: none is cut.
CAPTIONS = [("a bold stroke", "a stroke", "bold")[i % 3] for i in range(N)]


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    diffusers_layout.save(folder, *tiny)
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """The files of `caption`: 11 images of 8 px in two classes, 3 captions."""
    workdir = tmp_path_factory.mktemp("captioned")
    folder = workdir / "caption"
    draw = np.random.default_rng(0)
    ids = [f"i{i}" for i in range(N)]
    files.write_array(
        folder / "images.npy", draw.integers(0, 256, (N, 8, 8, 3), np.uint8)
    )
    rows = [{"id": id_, "split": "train", "label": i % 2} for i, id_ in enumerate(ids)]
    files.write_jsonl(folder / "images.jsonl", rows)
    files.write_json(folder / "splits.json", {"pool": [], "train": ids, "test": []})
    names = {"class_names": ["one", "photo"], "grey": False}
    files.write_json(folder / "dataset.json", names)
    pairs = zip(ids, CAPTIONS, strict=True)
    files.write_jsonl(
        folder / "captions.jsonl", [{"id": i, "caption": c} for i, c in pairs]
    )
    files.write_json(
        folder / "manifest.json",
        {"settings": {}, "inputs": {}, "artifacts": {}, "counts": {}},
    )
    return workdir


@pytest.fixture
def workdir(captioned, tmp_path):
    shutil.copytree(captioned, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """4 images, or 2 prompts, a shard: batches of 8 are cut at the borders."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * 2 * 2 * 8 * 4)
    assert 4 * 2 * 2 * 8 * 4 < 12 * 16 * 4


def make_config(base, **section):
    config = common.get_config()
    config.base.path = str(base)
    config.data.size = 8
    config.data.class_type = "digit"
    config.encode.batch_size = 3
    config.encode.update(section)
    return config


def digests(workdir):
    folder = workdir / "encode"
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(captioned, base, tmp_path_factory):
    """The cache with mirror images, which nothing interrupted: (workdir, cache)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(captioned, workdir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 4 * 2 * 2 * 8 * 4)
        encode.run(make_config(base, flip=True), workdir)
    return workdir, open_cache(workdir / "encode")


@pytest.fixture(scope="module")
def on_the_fly(tiny):
    """Moments of uint8 images by the model itself, as one jitted function."""
    model, params = tiny
    encoder = jax.jit(model.moments)
    return lambda images: encoder(params, jnp.asarray(images, jnp.float32) / 127.5 - 1)


def images_of(workdir):
    return np.load(workdir / "caption" / "images.npy")


def test_rows_are_the_images_then_their_mirror_images(whole, on_the_fly):
    workdir, cache = whole
    images = images_of(workdir)
    assert cache.moments.shape == (2 * N, 2, 2, 8)
    assert cache.flipped
    rows = cache.moments.take(np.arange(2 * N))
    expected = on_the_fly(np.concatenate([images, images[:, :, ::-1]]))
    # Batches of 22 and 8 sum in another order: six digits of fp32 agree.
    np.testing.assert_allclose(rows, expected, atol=2e-5)
    # Mirrored in pixels: the latents of a mirror image are not those mirrored.
    assert np.abs(rows[N:] - rows[:N, :, ::-1]).max() > 1e-2


def test_each_distinct_prompt_is_encoded_once_the_empty_one_first(whole, tiny):
    workdir, cache = whole
    model, params = tiny
    rows = files.read_jsonl(workdir / "encode" / "prompts.jsonl")
    distinct = dict.fromkeys(row["prompt"] for row in rows)
    assert len(distinct) == 6 and len(cache.text_states) == 7
    states = cache.text_states.take(cache.state_of)
    texts = ["", *(row["prompt"] for row in rows)]
    expected = jax.jit(model.text_states)(params, model.tokenize(texts))
    np.testing.assert_allclose(states, expected[1:], atol=2e-5)
    null = cache.text_states.take(np.zeros(1, int))
    np.testing.assert_allclose(null, expected[:1], atol=2e-5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("shard", [0, 3, 8])
def test_a_run_that_was_cut_ends_with_the_same_bytes(
    whole, workdir, base, shard, monkeypatch
):
    """Cut before shard `shard` of 4 + 6 was written; one of them is damaged, too."""
    write, count = shards.Writer.write, 0

    def mortal(writer, rows, array):
        nonlocal count
        if count == shard:
            raise Killed
        count += 1
        write(writer, rows, array)

    config = make_config(base, flip=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shards.Writer, "write", mortal)
        encode.run(config, workdir)
    assert not (workdir / "encode" / "manifest.json").exists()
    written = sorted((workdir / "encode").rglob("*.npy"))
    assert len(written) == shard
    if written:
        content = written[-1].read_bytes()
        written[-1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    encode.run(config, workdir)
    assert digests(workdir) == digests(whole[0])


def test_a_finished_cache_is_not_touched_and_a_lost_shard_filled_in(
    whole, workdir, base, monkeypatch
):
    shutil.copytree(whole[0] / "encode", workdir / "encode")
    config = make_config(base, flip=True, batch_size=5)  # changes no shard
    with monkeypatch.context() as patch:
        patch.setattr(diffusers_layout, "load", None)
        encode.run(config, workdir)
    config = make_config(base, flip=True)
    (workdir / "encode" / "moments" / "00001.npy").unlink()
    encode.run(config, workdir)
    assert digests(workdir) == digests(whole[0])


@pytest.mark.parametrize("data, fsdp", [(1, 1), (2, 4)])
def test_any_devices_make_the_cache_of_eight(
    whole, workdir, base, data, fsdp, monkeypatch
):
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)
    encode.run(make_config(base, flip=True), workdir)
    cache = open_cache(workdir / "encode")
    for name in ("moments", "text_states"):
        a, b = (getattr(c, name) for c in (cache, whole[1]))
        rows = np.arange(len(a))
        np.testing.assert_allclose(a.take(rows), b.take(rows), atol=2e-5)


def test_nothing_is_compiled_for_the_short_batches_and_progress_counts_all(
    workdir, base, monkeypatch, caplog
):
    """11 images in shards of 4 and batches of 8: none is of the batch's size."""
    traced = []
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: False, raising=False)
    over_batches = sharding.over_batches

    def counted(function, params, **options):
        def traces(params, batch):
            traced.append(batch.shape)
            return function(params, batch)

        return over_batches(traces, params, **options)

    monkeypatch.setattr(sharding, "over_batches", counted)
    caplog.set_level("INFO")
    encode.run(make_config(base), workdir)
    assert traced == [(8, 12), (8, 8, 8, 3)]
    assert "encode/prompts: 7/7" in caplog.text
    assert f"encode/images: {N}/{N}" in caplog.text


def test_float16_halves_the_disk_and_rounds_once(whole, workdir, base):
    encode.run(make_config(base, flip=True, dtype="float16"), workdir)
    half = open_cache(workdir / "encode")
    for name in ("moments", "text_states"):
        a, b = (getattr(c, name) for c in (half, whole[1]))
        assert (a.dtype, b.dtype) == (np.float16, np.float32)
        rows = np.arange(len(a))
        np.testing.assert_array_equal(a.take(rows), b.take(rows).astype(np.float16))
    pairs = np.array([[0, 3], [2, 1]], np.int32)
    batch = read_pairs(half, pairs, 0, seed=0, batch_size=2)
    assert {array.dtype.name for array in batch.values()} == {"float32"}


def test_a_cache_that_does_not_fit_is_refused_before_weights_are_read(
    workdir, base, monkeypatch
):
    """Counted in bytes; shards that exist already need no space."""
    disk = types.SimpleNamespace(free=0)
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda _: disk)
    config = make_config(base, flip=True)
    needed = 2 * N * 2 * 2 * 8 * 4 + 7 * 12 * 16 * 4
    load = diffusers_layout.load

    def no_weights(folder, components, variant):
        assert not components
        return load(folder, components, variant)

    with monkeypatch.context() as patch:
        patch.setattr(diffusers_layout, "load", no_weights)
        disk.free = needed
        with pytest.raises(UserError, match=f"{needed} bytes of free disk") as error:
            encode.run(config, workdir)
        assert f"{2 * N} images x {2 * 2 * 8 * 4} bytes" in str(error.value)
        assert "encode.dtype=float16" in str(error.value)
        assert not list((workdir / "encode").rglob("*.npy"))
    disk.free = 2 * needed
    encode.run(config, workdir)
    (workdir / "encode" / "manifest.json").unlink()
    (workdir / "encode" / "moments" / "00000.npy").unlink()
    disk.free = 2 * 4 * 2 * 2 * 8 * 4
    encode.run(config, workdir)


def test_another_dtype_may_follow_a_full_disk(workdir, base, monkeypatch):
    disk = types.SimpleNamespace(free=0)
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda _: disk)
    with pytest.raises(UserError, match="dtype=float16"):
        encode.run(make_config(base), workdir)
    assert not (workdir / "encode" / "base.json").exists()  # nor a base's commit
    disk.free = 10**9
    encode.run(make_config(base, dtype="float16"), workdir)
    assert open_cache(workdir / "encode").moments.dtype == np.float16


def test_another_base_may_follow_one_that_failed_its_check(workdir, base, tmp_path):
    half = shutil.copytree(base, tmp_path / "half")
    to_variant(half)
    with pytest.raises(UserError, match="variant"):
        encode.run(make_config(half), workdir)
    encode.run(make_config(base), workdir)


@pytest.mark.parametrize("part, row", [("vae", "image i0"), ("text_encoder", "prompt")])
def test_damaged_weights_are_found_at_once(tiny, workdir, base, part, row, monkeypatch):
    model, params = tiny
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params[part])
    loaded = model, {**params, part: broken}
    monkeypatch.setattr(diffusers_layout, "load", lambda *_: loaded)
    with pytest.raises(UserError, match=f"encode: {row}.*NaN or infinity"):
        encode.run(make_config(base), workdir)


def test_what_float16_cannot_hold_is_refused(workdir):
    part = encode.Part(
        unit="row",
        components=("vae",),
        encode=lambda params, batch: params["vae"] * batch,
        inputs=lambda rows: np.asarray(rows, np.float32)[:, None],
        name=str,
        writer=shards.Writer(workdir, rows=20, row_shape=(1,), dtype="float16"),
    )
    params = {"vae": np.float32(1e4)}
    with pytest.raises(
        UserError, match="row 7: .*outside the range of float16.*float32"
    ):
        encode.fill(part, params, size=8, mesh=sharding.make_mesh())


def test_another_size_of_image_is_refused(workdir, base):
    config = make_config(base)
    config.data.size = 10
    with pytest.raises(UserError, match="a multiple of 4"):
        encode.run(config, workdir)


# What fine-tuning reads.


def test_a_step_on_the_cache_is_the_step_on_the_fly(whole, tiny, on_the_fly):
    workdir, cache = whole
    images = images_of(workdir)
    model, params = tiny
    model, params = model.widened(params)
    pairs = np.random.default_rng(0).integers(N, size=(20, 2)).astype(np.int32)
    rows = pair_rows(pairs, 0, seed=0, batch_size=6, flip=True)
    assert rows["source_flip"].any() and rows["target_flip"].any()
    weight = {"weight": np.ones(6, np.float32)}
    weight["null_states"] = cache.null_states
    cached = read_pairs(cache, pairs, 0, seed=0, batch_size=6) | weight
    prompts = [
        row["prompt"] for row in files.read_jsonl(workdir / "encode/prompts.jsonl")
    ]

    def moments(role):
        flips = zip(rows[role], rows[f"{role}_flip"], strict=True)
        return on_the_fly(np.stack([images[i][:, :: -1 if f else 1] for i, f in flips]))

    encode_text = jax.jit(model.text_states)
    ids = model.tokenize([*(prompts[i] for i in rows["target"]), ""])
    states = encode_text(params, ids)
    fly = {"source_moments": moments("source"), "target_moments": moments("target")}
    fly |= weight | {"text_states": states[:-1], "null_states": states[-1]}
    # SGD: Adam's first steps are the gradients' signs, which no tolerance forgives.
    tx = optax.sgd(0.01)
    step = jit_fast(
        functools.partial(
            finetune.train_step,
            model=model,
            tx=tx,
            key=rng.purpose_key(0, "finetune"),
            schedule=optax.constant_schedule(0.01),
            drop_rate=0.05,
        )
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state = create_state(params["unet"], tx, mesh)
    (a, of_a), (b, of_b) = step(state, cached), step(state, fly)
    # The same program on the same numbers, but for the order in which batches of 8 and
    # of 6 are summed in the encoders, which is 2e-6 of them.
    np.testing.assert_allclose(of_a["loss"], of_b["loss"], rtol=1e-5)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), a.params, state.params)
    apart = jax.tree.map(lambda x, y: np.abs(x - y).max(), a.params, b.params)
    assert max(jax.tree.leaves(apart)) < 1e-3 * max(jax.tree.leaves(moved))
    # And it tells images from their mirror images.
    plain = cached | {"target_moments": cache.moments_of(rows["target"])}
    other = step(state, plain)[1]["loss"]
    assert abs(other - of_a["loss"]) > 1e-3 * of_a["loss"]


def test_mirror_images_are_drawn_for_source_and_target_independently():
    pairs = np.arange(80, dtype=np.int32).reshape(40, 2)
    read = functools.partial(pair_rows, pairs, batch_size=50)
    batches = [read(step, seed=0, flip=True) for step in range(40)]
    source, target = (
        np.concatenate([batch[f"{role}_flip"] for batch in batches])
        for role in ("source", "target")
    )
    # 2000 fair coins: a share is within 0.056 of its mean in all but one of 10^6 runs.
    for share in (source.mean(), target.mean(), (source == target).mean()):
        assert abs(share - 0.5) < 0.056
    again, without = read(7, seed=0, flip=True), read(7, seed=0)
    jax.tree.map(np.testing.assert_array_equal, again, batches[7])
    assert not without["source_flip"].any() and not without["target_flip"].any()
    for role in ("source", "target"):
        np.testing.assert_array_equal(without[role], again[role])
    other = read(7, seed=1, flip=True)
    assert (other["source_flip"] != again["source_flip"]).any()
    assert (batches[8]["source_flip"] != again["source_flip"]).any()


def test_without_mirror_images_nothing_is_flipped(workdir, base):
    encode.run(make_config(base), workdir)
    cache = open_cache(workdir / "encode")
    assert len(cache.moments) == N and not cache.flipped


def test_a_damaged_cache_is_refused_before_training(whole, workdir):
    shutil.copytree(whole[0] / "encode", workdir / "encode")
    path = workdir / "encode" / "text_states" / "00001.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        UserError, match="00001.npy.*Delete it and run the stage encode"
    ):
        open_cache(workdir / "encode").verify()


def test_captions_that_are_cut_and_lost_are_counted_by_class(workdir, base, caplog):
    path = workdir / "caption" / "captions.jsonl"
    long = " ".join(["stroke"] * 99)
    rows = [row | {"caption": long} for row in files.read_jsonl(path)[:4]]
    files.write_jsonl(path, rows + files.read_jsonl(path)[4:])
    config = make_config(base)
    config.data.prompt = "{caption} {label}"
    with caplog.at_level("INFO"):
        encode.run(config, workdir)
    assert "4 captions were cut (one 2, photo 2) to the 12 tokens" in caplog.text
    counts = files.read_json(workdir / "encode" / "manifest.json")["counts"]
    assert (counts["captions_cut"], counts["captions_lost"]) == (4, 0)
    written = files.read_jsonl(workdir / "encode" / "prompts.jsonl")
    assert [row.get("caption_kept") for row in written] == ["part"] * 4 + [None] * 7
    lost = captions.cut_by_class([row | {"caption_kept": "none"} for row in written])
    encode.report_cut_captions(lost, 12)
    assert "11 captions were lost (one 6, photo 5): the class prompt" in caplog.text


def test_a_cache_goes_on_with_the_prompts_that_it_began_with(workdir, base):
    """Those of a version that cut captions elsewhere, too."""
    config = make_config(base)
    encode.run(config, workdir)
    record = workdir / "encode" / "manifest.json"
    known = files.read_json(record)
    path = workdir / "encode" / "prompts.jsonl"
    rows = files.read_jsonl(path)
    files.write_jsonl(path, [row | {"tokens": 9} for row in rows])
    described = {"sha256": files.sha256(path), "bytes": path.stat().st_size}
    known["artifacts"]["prompts.jsonl"] = described
    files.write_json(record, known)
    (workdir / "digests" / "encode.jsonl").unlink()
    (workdir / "encode" / "text_states" / "00000.npy").unlink()
    encode.run(config, workdir)
    assert {row["tokens"] for row in files.read_jsonl(path)} == {9}
    assert files.read_json(record)["artifacts"] == known["artifacts"]


def test_many_processes_make_the_cache_of_one(whole, workdir, base, monkeypatch):
    """Of three all but the first are killed after a shard; two make the rest."""
    write, killed = shards.Writer.write, threading.Event()

    def mortal(writer, rows, array):
        if processes.index() and killed.is_set():
            raise Killed
        write(writer, rows, array)
        killed.set()

    config = make_config(base, flip=True)
    with monkeypatch.context() as patch, pytest.raises((Killed, AssertionError)):
        patch.setattr(shards.Writer, "write", mortal)
        run_together(monkeypatch, 3, lambda: encode.run(config, workdir))
    assert not (workdir / "encode" / "manifest.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in workdir.glob("encode/*/*.npy")}
    assert kept
    run_together(monkeypatch, 2, lambda: encode.run(config, workdir))
    assert digests(workdir) == digests(whole[0])
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
