"""`benchmarks/hlo.py` on programs whose collectives, loops and bytes are known."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding, PartitionSpec

from mvc_jax.training import sharding

sys.path.insert(0, str(ROOT / "benchmarks"))
import hlo  # noqa: E402

# As a TPU compiler prints it: tiles, memory spaces, a loop, a fusion that slices.
_TPU = """
HloModule jit_f

%sliced (p.0: f32[10,8,128], p.1: s32[]) -> f32[8,128] {
  %p.0 = f32[10,8,128]{2,1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %s = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p.0, %p.1, %zero, %zero)
}

%body (state: (f32[3,40], bf16[16,128])) -> (f32[3,40], bf16[16,128]) {
  %state = (f32[3,40]{1,0:T(8,128)}, bf16[16,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = f32[3,40]{1,0:T(8,128)} get-tuple-element(%state), index=0
  %y = f32[3,40]{1,0:T(8,128)} negate(%x)
  %v = bf16[16,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %near = (bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, bf16[16,128]{1,0}, u32[]) copy-start(%v)
  %w = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%near)
  ROOT %out = (f32[3,40]{1,0:T(8,128)}, bf16[16,128]{1,0}) tuple(%y, %w)
}

%condition (state: (f32[3,40], bf16[16,128])) -> pred[] {
  %state = (f32[3,40], bf16[16,128]) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: f32[10,8,128], i: s32[], b: (f32[3,40], bf16[16,128])) -> f32[8,128] {
  %a = f32[10,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %b = (f32[3,40]{1,0:T(8,128)}, bf16[16,128]{1,0:T(8,128)(2,1)}) parameter(2)
  %loop = (f32[3,40], bf16[16,128]) while(%b), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %f = f32[8,128]{1,0:T(8,128)} fusion(%a, %i), kind=kLoop, calls=%sliced
}
"""

# A part that is fetched to the chip while others work, and used there.
_FETCHED = """
HloModule jit_f

ENTRY %main (a: f32[10,8,128]) -> f32[2,8,128] {
  %a = f32[10,8,128]{2,1,0:T(8,128)} parameter(0)
  %near = ((f32[10,8,128]{2,1,0:T(8,128)}), f32[2,8,128]{2,1,0:T(8,128)S(1)}, \
s32[]{:S(2)}) slice-start(%a), slice={[0:2], [0:8], [0:128]}
  %b = f32[2,8,128]{2,1,0:T(8,128)S(1)} slice-done(%near)
  ROOT %c = f32[2,8,128]{2,1,0:T(8,128)} negate(%b)
}
"""
_FETCHED_LATER = """
HloModule jit_f

%part (p: f32[10,8,128]) -> f32[2,8,128] {
  %p = f32[10,8,128]{2,1,0:T(8,128)} parameter(0)
  ROOT %s = f32[2,8,128]{2,1,0:T(8,128)S(1)} slice(%p), slice={[0:2], [0:8], [0:128]}
}

ENTRY %main (a: f32[10,8,128]) -> f32[2,8,128] {
  %a = f32[10,8,128]{2,1,0:T(8,128)} parameter(0)
  %near = ((f32[10,8,128]{2,1,0:T(8,128)}), f32[2,8,128]{2,1,0:T(8,128)S(1)}, \
s32[]{:S(2)}) async-start(%a), calls=%part
  %b = f32[2,8,128]{2,1,0:T(8,128)S(1)} async-done(%near)
  ROOT %c = f32[2,8,128]{2,1,0:T(8,128)} negate(%b)
}
"""

# One gather beside two fusions, as a TPU compiler prints it, and another one.
_BESIDE = """
HloModule jit_f

%start (p: bf16[16,8]) -> bf16[128,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  ROOT %g = bf16[128,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}, \
frontend_attributes={chain_id="4"}
}

%middle (p: bf16[16,8]) -> bf16[128,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  ROOT %g = bf16[128,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}, \
frontend_attributes={chain_id="4"}
}

ENTRY %main (a: bf16[16,8]) -> bf16[128,8] {
  %a = bf16[16,8]{1,0} parameter(0)
  %b = bf16[128,8]{1,0} fusion(%a), kind=kCustom, calls=%start
  %c = bf16[128,8]{1,0} fusion(%a), kind=kCustom, calls=%middle
  ROOT %d = bf16[128,8]{1,0} all-gather(%a), channel_id=1, dimensions={0}
}
"""


def compiled(function, *arguments, **options):
    text = jax.jit(function, **options).lower(*arguments).compile().as_text()
    return hlo.Module(text)


@functools.cache
def on_devices(devices=8):
    return sharding.make_mesh(devices=jax.devices()[:devices])


def shape(*sizes, spec=None, dtype=jnp.float32):
    spec = PartitionSpec() if spec is None else PartitionSpec(*spec)
    return jax.ShapeDtypeStruct(
        sizes, dtype, sharding=NamedSharding(on_devices(), spec)
    )


def test_tiles_pad_memory_on_chip_is_free_and_loops_are_multiplied():
    module = hlo.Module(_TPU)
    assert module.runs == {"main": 1, "body": 5, "condition": 5}
    padded = 8 * 128 * 4  # of f32[3, 40]
    loop = 5 * (2 * padded + 16 * 128 * 2)  # the copy reads memory, and writes VMEM
    fusion = 2 * 8 * 128 * 4 + 4  # the slice, the result and the index
    assert module.bytes_accessed() == loop + fusion
    assert hlo.moves(module) == {}


@pytest.mark.parametrize("text", [_FETCHED, _FETCHED_LATER])
def test_of_what_is_fetched_in_part_the_part_counts(text):
    part = 2 * 8 * 128 * 4
    assert hlo.Module(text).bytes_accessed() == part + part  # read, and written


@pytest.mark.parametrize("length", [1, 7])
def test_a_scan_multiplies_its_matrix_products(length):
    def steps(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=length)[0]

    module = compiled(steps, shape(48, 48))
    calls = hlo.library_calls(module)
    assert sum(calls.values()) == length
    assert {dtype for _, dtype in calls} == {"f32"}


def test_the_sum_of_a_gradient_is_one_reduction_of_its_bytes():
    def gradient(kernel, batch):
        return jax.grad(lambda kernel: jnp.square(batch @ kernel).mean())(kernel)

    rows = (sharding.BATCH_AXES,)
    module = compiled(gradient, shape(32, 16), shape(64, 32, spec=rows))
    assert hlo.collectives(module) == {("all-reduce", "f32"): (1, 4 * 32 * 16)}


def test_a_gather_is_counted_by_its_result():
    x = shape(64, 32, spec=(sharding.BATCH_AXES,))
    whole = NamedSharding(on_devices(), PartitionSpec())
    module = compiled(lambda x: x, x, out_shardings=whole)
    assert hlo.collectives(module) == {("all-gather", "f32"): (1, 4 * 64 * 32)}


def test_a_collective_beside_computation_counts_once():
    found = hlo.collectives(hlo.Module(_BESIDE))
    assert found == {("all-gather", "bf16"): (2, 2 * 2 * 128 * 8)}


def test_an_elementwise_program_reads_and_writes_each_array_once():
    module = compiled(lambda x, y: jnp.sin(x) * y + 1, shape(128, 96), shape(128, 96))
    assert module.bytes_accessed() == 3 * 4 * 128 * 96


def test_a_transpose_is_a_move_and_has_its_origin():
    def transposed(x):
        with jax.named_scope("block_3"):
            return jnp.transpose(x, (1, 0))

    module = compiled(transposed, shape(256, 64))
    assert sum(hlo.moves(module).values()) == 4 * 256 * 64
    ((origin, size),) = hlo.move_origins(module)
    assert origin == "block/transpose" and size == 4 * 256 * 64


def test_convolutions_and_products_are_told_apart():
    def both(image, kernel, matrix):
        image = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return image @ matrix

    module = compiled(both, shape(1, 8, 8, 4), shape(3, 3, 4, 16), shape(16, 48))
    calls = hlo.library_calls(module)
    assert calls[("convolution", "f32")] == 1
    assert sum(calls.values()) == 2


def test_the_summary_is_json():
    import json

    found = hlo.summary(compiled(lambda x: (x @ x.T).sum(), shape(8, 8)))
    assert json.loads(json.dumps(found))["bytes"] == pytest.approx(found["bytes"])
    assert np.isfinite(found["bytes"])


def test_a_loop_without_its_count_runs_as_often_as_its_condition_says():
    """XLA for TPUs writes the limit into the condition alone."""
    count = 'backend_config={"known_trip_count":{"n":"5"}}'
    condition = """
  %limit = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} parameter(0)
  ROOT %true = pred[]{:T(512)} compare(%i, %limit), direction=LT
"""
    known = hlo.Module(_TPU)
    start = _TPU.index("  ROOT %true")
    counted = f"{_TPU[:start]}{condition}{_TPU[_TPU.index('}', start) :]}"
    for text, expected in ((counted, 5), (counted.replace(count, ""), 7)):
        assert hlo.Module(text).runs["body"] == expected
    assert known.runs["body"] == 5
    assert hlo.Module(_TPU.replace(count, "")).runs["body"] == 1
