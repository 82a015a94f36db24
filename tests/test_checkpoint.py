"""Checkpoints restore the same bits, survive damage and full disks, and are rotated."""

import hashlib
import logging
import random
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mvc_jax import errors
from mvc_jax.errors import UserError
from mvc_jax.training import checkpoint, sharding
from mvc_jax.training.checkpoint import Checkpoints
from mvc_jax.training.checksums import checksums

MESHES = {"1": (1, 1), "8": (8, 1), "2x4": (2, 4)}


def make_state(seed, mesh="1", width=16):
    """A tree of arrays like a training state, with different values for each seed."""
    draw = np.random.default_rng(seed)
    state = {
        "layer": {"kernel": draw.normal(size=(8, width)).astype(np.float32)},
        "half": jnp.asarray(draw.normal(size=5), jnp.bfloat16),
        "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
        "mask": draw.random(3) < 0.5,
        "step": np.int32(seed),
    }
    data, fsdp = MESHES[mesh]
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    return jax.device_put(state, sharding.tree_shardings(state, mesh))


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def save(folder, *steps, **options):
    """Saves `make_state(step)` for each of `steps`, with a falling loss."""
    checkpoints = Checkpoints(folder, every=1, **options)
    for step in steps:
        checkpoints.save(step, make_state(step), {"loss": 1 / step})
    checkpoints.close()


def restore(folder, state=None, **options):
    checkpoints = Checkpoints(folder, every=1, **options)
    try:
        return checkpoints.restore(make_state(0) if state is None else state)
    finally:
        checkpoints.close()


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def digests(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).digest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, 2, 4)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved`, to be damaged."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


# Restoring.


@pytest.mark.parametrize("after", MESHES)
@pytest.mark.parametrize("before", MESHES)
def test_every_bit_is_restored_on_any_mesh(tmp_path, before, after):
    checkpoints = Checkpoints(tmp_path, every=1)
    checkpoints.save(7, make_state(7, before))
    checkpoints.close()
    given = make_state(0, after)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, given)
    restored = restore(tmp_path, given)
    assert bits(restored) == bits(make_state(7))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings
    kernel = restored["layer"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == 16 // MESHES[after][1]


def test_shapes_are_enough_and_arrays_are_deleted(saved):
    """So that a device never holds two states."""
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, make_state(0))
    assert bits(restore(saved, shapes)) == bits(make_state(4))
    given = make_state(0)
    restore(saved, given)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_without_a_checkpoint_the_given_state_is_returned(tmp_path):
    given = make_state(3)
    assert restore(tmp_path, given) is given
    assert bits(given) == bits(make_state(3))


def test_buffers_may_be_deleted_while_a_save_is_running(tmp_path):
    state = make_state(5)
    checkpoints = Checkpoints(tmp_path, every=1)
    checkpoints.save(5, state)
    jax.tree.map(lambda leaf: leaf.delete(), state)
    checkpoints.close()
    assert bits(restore(tmp_path)) == bits(make_state(5))


# When to save, and which to keep.


@pytest.mark.parametrize("name", ["lr[1e-4]", "a**b x?", "-~ {y} 'z' %s"])
def test_the_name_of_a_folder_is_no_pattern(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    save(folder, 1, 2)
    assert steps_in(folder) == [1, 2] and not folder.is_symlink()
    assert bits(restore(folder)) == bits(make_state(2))


def test_a_save_is_due_by_step_and_by_time(tmp_path):
    now = [100.0]
    checkpoints = Checkpoints(tmp_path, every=10, minutes=2.0, clock=lambda: now[0])
    assert [step for step in range(1, 31) if checkpoints.due(step)] == [10, 20, 30]
    now[0] += 119
    assert not checkpoints.due(31)
    now[0] += 1
    assert checkpoints.due(31)
    checkpoints.save(31, make_state(31))
    assert not checkpoints.due(32)
    checkpoints.close()


def test_saves_by_time_are_off_by_default(tmp_path):
    now = [0.0]
    checkpoints = Checkpoints(tmp_path, every=10, clock=lambda: now[0])
    now[0] = 1e9
    assert not checkpoints.due(11)
    checkpoints.close()


@pytest.mark.parametrize("reopened", [False, True])
def test_the_newest_and_the_lowest_loss_are_kept(tmp_path, reopened):
    """Never one with NaN, and also if another process saved the older ones."""
    losses = {1: 0.5, 2: float("nan"), 3: 0.2, 4: 0.9, 5: 0.2, 6: 0.7, 7: 0.3, 8: 0.4}
    checkpoints = Checkpoints(tmp_path, every=1, best="loss")
    for step, loss in losses.items():
        checkpoints.save(step, make_state(step), {"loss": loss})
        if reopened:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, every=1, best="loss")
        if step == 2:
            checkpoints.save(2, make_state(2))  # exists already: nothing happens
    checkpoints.close()
    assert steps_in(tmp_path) == [5, 7, 8]


def test_without_a_metric_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=3)
    assert steps_in(tmp_path) == [2, 3, 4]


# Damage.


def delete(path, draw):
    path.unlink()


def empty(path, draw):
    path.write_bytes(b"")


def halve(path, draw):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip_a_bit(path, draw):
    content = bytearray(path.read_bytes()) or bytearray(1)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [delete, empty, halve, flip_a_bit])
def test_damage_to_any_file_loses_one_checkpoint_at_most(
    saved, tmp_path, caplog, damage
):
    """Either the newest is restored unchanged, or the previous one with a warning."""
    seed = random.SystemRandom().randrange(1000)
    print(f"places drawn from seed {seed}")
    lost = 0
    for number, path in enumerate(sorted(p for p in saved.rglob("*") if p.is_file())):
        if path.relative_to(saved).parts[0] != "4":
            continue
        folder = shutil.copytree(saved, tmp_path / f"{number}")
        damage(folder / path.relative_to(saved), random.Random(seed))
        caplog.clear()
        restored = restore(folder)
        if int(restored["step"]) == 4:
            assert bits(restored) == bits(make_state(4)), path
            assert steps_in(folder) == [2, 4]
            assert "is damaged" not in caplog.text
        else:
            lost += 1
            assert bits(restored) == bits(make_state(2)), path
            assert steps_in(folder) == [2]
            assert (folder / "damaged-4").is_dir()
            assert f"{folder}/4 is damaged" in caplog.text
            assert "step 2 is restored" in caplog.text
    assert lost >= 3  # the data, its index and the record, at least


def test_wrong_values_of_the_right_shape_are_found_by_their_checksum(
    folder, tmp_path, caplog
):
    """Files that Orbax reads without an error, of a state that differs in one bit."""
    checkpoints = Checkpoints(tmp_path / "other", every=1)
    other = make_state(4)
    kernel = np.asarray(other["layer"]["kernel"]).copy()
    kernel.view(np.uint32)[3, 5] ^= 1
    other["layer"]["kernel"] = kernel
    checkpoints.save(4, jax.device_put(other))
    checkpoints.close()
    shutil.rmtree(folder / "4" / "state")
    shutil.copytree(tmp_path / "other" / "4" / "state", folder / "4" / "state")
    assert bits(restore(folder)) == bits(make_state(2))
    assert "the checksum of ['layer']['kernel'] is wrong" in caplog.text


def test_a_damaged_step_is_quarantined_and_can_be_saved_again(folder, caplog):
    for _ in range(2):
        (folder / "4" / "record" / "metadata").unlink()
        with caplog.at_level(logging.WARNING):
            restore(folder)
        save(folder, 4)
        assert bits(restore(folder)) == bits(make_state(4))
    assert sorted(path.name for path in folder.glob("damaged*")) == [
        "damaged-4",
        "damaged-4-2",
    ]
    assert caplog.text.count("is damaged") == 2


def test_if_all_are_damaged_the_run_stops_and_changes_nothing(folder):
    for path in folder.glob("*/state/manifest.ocdbt"):
        path.unlink()
    before = digests(folder)
    for _ in range(2):  # nor does the next run start from scratch
        with pytest.raises(UserError, match="got 2 damaged.*delete it") as caught:
            restore(folder)
        assert caught.value.name == str(folder)
        assert [line[:3] for line in caught.value.details] == ["4: ", "2: "]
    assert digests(folder) == before


def test_checkpoints_of_another_model_are_refused_and_kept(folder):
    before = digests(folder)
    other = make_state(0, width=32)
    del other["mask"]
    with pytest.raises(
        UserError, match="checkpoints/4: .*got 2 different ones"
    ) as caught:
        restore(folder, other)
    assert caught.value.details == (
        "['layer']['kernel']: ['float32', [8, 32]], ['float32', [8, 16]]",
        "['mask']: None, ['bool', [3]]",
    )
    assert digests(folder) == before
    assert np.isfinite(other["layer"]["kernel"]).all()  # and was not deleted


def test_lack_of_memory_is_not_damage(folder, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    before = digests(folder)
    monkeypatch.setattr(checkpoint, "checksums", no_memory)
    with pytest.raises(MemoryError):
        restore(folder)
    assert digests(folder) == before


def test_leftovers_of_a_killed_save_are_never_restored_and_are_deleted(folder):
    (folder / "4").rename(folder / "4.orbax-checkpoint-tmp")
    assert bits(restore(folder)) == bits(make_state(2))
    assert [path.name for path in folder.iterdir()] == ["2"]
    save(folder, 4)
    assert steps_in(folder) == [2, 4]


# A full disk.


def test_a_save_without_disk_space_is_refused_before_it_starts(folder, monkeypatch):
    usage = shutil.disk_usage(folder)._replace(free=100)
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda _: usage)
    before = digests(folder)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(make_state(6)))
    with pytest.raises(UserError, match=f"{folder}: wanted {size} bytes .* got 100"):
        save(folder, 6)
    assert digests(folder) == before


@pytest.mark.parametrize("reported_by", ["save", "close"])
def test_a_disk_that_fills_up_during_a_save_costs_only_that_save(
    folder, monkeypatch, reported_by
):
    async def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [28]")

    checkpoints = Checkpoints(folder, every=1)
    state = make_state(6)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full)
        checkpoints.save(6, state)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with pytest.raises(UserError, match=f"{folder}/6: wanted {size} bytes"):
            if reported_by == "save":
                checkpoints.save(7, make_state(7))
            else:
                checkpoints.close()
    assert steps_in(folder) == [2, 4]
    assert bits(state) == bits(make_state(6))
    for thread in threading.enumerate():  # as at the end of the process
        if type(thread).__name__ == "_SignalingThread":  # Orbax's other writers
            thread.join()
    if reported_by == "save":
        checkpoints.save(7, make_state(7))  # there is space again
        checkpoints.close()
    assert bits(restore(folder)) == bits(make_state(7 if reported_by == "save" else 4))
    save(folder, 8)
    assert not list(folder.glob("*tmp*"))  # its incomplete files are deleted


# Checksums.


def test_a_checksum_is_the_same_on_every_mesh():
    sums = {name: checksums(make_state(1, name)) for name in MESHES}
    assert sums["1"] == sums["8"] == sums["2x4"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_checksum_detects_a_flipped_bit_and_swapped_elements(dtype):
    array = np.asarray(jnp.asarray(np.arange(24).reshape(4, 6) % 7 > 3, dtype))
    flipped, swapped = array.copy(), array.copy()
    flipped.view(np.uint8)[2, 3] ^= 1
    swapped[0, 0], swapped[0, 4] = array[0, 4], array[0, 0]
    assert array[0, 0] != array[0, 4]
    found = [checksums([jnp.asarray(x)]) for x in (array, flipped, swapped)]
    assert len(set(map(tuple, found))) == 3


def test_a_checksum_needs_memory_for_one_array_at_most():
    """None on an accelerator; XLA on a CPU may keep the hashed words of one array."""
    from mvc_jax.training.checksums import _sum

    array = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    memory = _sum.lower(array).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 1.1 * 512 * 512 * 4
    assert memory.output_size_in_bytes == 4


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "bool", "int8", "int32", "uint32", "float16"]
)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4, 7)])
def test_sums_on_the_host_are_those_of_the_devices(dtype, shape, monkeypatch):
    from mvc_jax.training import checksums as module

    monkeypatch.setattr(module, "_BLOCK", 16)
    drawn = np.random.default_rng(0).normal(size=shape)
    array = jnp.asarray(drawn * 100).astype(dtype)
    assert module._is_on_host(array)
    assert checksums([array]) == [int(module._sum(array))]
