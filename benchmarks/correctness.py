"""Whether bfloat16 and the kernels of attention are right on this device, and fast.

Errors are relative, against plain attention in float32 with exact products: the norm of
the difference over the norm of what is right.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import programs

from mvc_jax.models import attention
from mvc_jax.training import sharding

HEADS, PROMPT = 8, 77
# Tokens and widths of the heads of Stable Diffusion 1.x at 512 px, by level.
LEVELS = ((4096, 40), (1024, 80), (256, 160), (64, 160))
LARGEST_ERROR = 0.1  # bfloat16 has 8 bits; some layers of it are off by a hundredth


def block(*, batch: int, family: str, latents: int) -> Iterator[dict]:
    """The error of a UNet: its prediction, and a gradient.

    Args:
      batch: examples.
      family: a key of `architectures.UNETS`.
      latents: their side.
    """
    model = programs.architecture(programs.Options(family=family))
    shapes = {
        "unet": model.shapes("unet"),
        "latents": jax.ShapeDtypeStruct((batch, latents, latents, 8), jnp.float32),
        "states": jax.ShapeDtypeStruct((batch, PROMPT, model.text_width), jnp.float32),
    }
    given = random(shapes)

    def run(given, *, dtype: str, choice: str):
        computed = model.with_compute_options(dtype=dtype, attention=choice)

        def loss(unet):
            found = computed.denoise(
                {"unet": unet},
                given["latents"],
                jnp.arange(batch, dtype=jnp.int32),
                given["states"],
            )
            return jnp.square(found).mean(), found

        return jax.grad(loss, has_aux=True)(given["unet"])

    with jax.default_matmul_precision("highest"):
        right = jax.jit(functools.partial(run, dtype="float32", choice="xla"))(given)
    found = jax.jit(functools.partial(run, dtype="bfloat16", choice="auto"))(given)
    for what, ours, wanted in zip(("gradient", "forward"), found, right, strict=True):
        yield measure.row(
            f"one block, {what}, bfloat16 and auto against float32",
            100 * error(ours, wanted),
            "% error",
        )


def layers(
    *, batch: int, levels: Sequence[tuple[int, int]] = LEVELS
) -> Iterator[dict[str, Any]]:
    """Times the implementations of attention, to self and to a prompt, by level.

    Args:
      batch: examples.
      levels: tokens and width of a head.
    """
    for keys in (None, PROMPT):
        for tokens, width in levels:
            yield from layer(batch, tokens, keys or tokens, width)


def layer(batch: int, tokens: int, keys: int, width: int) -> Iterator[dict[str, Any]]:
    """Times the implementations of one layer, forward and backward.

    A row of each that differs here: `auto` takes one of them, and a choice that does
    not know the layer falls back to another.
    """
    shapes = [(batch, n, HEADS, width) for n in (tokens, keys, keys, tokens)]
    given = random([jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes])
    with jax.default_matmul_precision("highest"):
        exact = [array.astype(jnp.float32) for array in given]
        right = jax.jit(both_ways("xla"))(*exact)
    del exact
    taken, others = implementations(given)
    name = f"{'self' if keys == tokens else 'cross'}-attention, {tokens} tokens, "
    name += f"{HEADS} heads of {width}: "
    rows, seconds = [], {}
    for choice in others:
        try:
            forward = measure.seconds_of(
                jax.jit(functools.partial(attention.attend, choice=choice)), *given[:3]
            )
            program = jax.jit(both_ways(choice))
            seconds[choice] = measure.seconds_of(program, *given)
            worst = max(map(error, program(*given), right))
        except Exception as failure:  # one kernel costs one row
            yield {"setting": name + choice, "error": failure}
            continue
        rows.append(
            measure.row(
                name + choice,
                1e3 * seconds[choice],
                "ms, forward and backward",
                tflops=12e-12 * batch * HEADS * tokens * keys * width / seconds[choice],
                note=f"forward {1e3 * forward:.3g} ms; error {worst:.2%}",
            )
        )
    for row, choice in zip(rows, seconds, strict=True):
        if choice == taken:
            best = min(seconds, key=seconds.get)
            row["note"] += "; auto takes it, " + (
                "the fastest" if best == taken else f"but {best} is faster"
            )
        if "xla" in seconds and choice != "xla":
            row |= {"ratio": seconds["xla"] / seconds[choice], "ratio_to": "xla"}
        yield row


def implementations(given: Sequence[jax.Array]) -> tuple[str, list[str]]:
    """The choice that `auto` takes for a layer, and all choices that differ there."""

    def program(choice: str) -> str:
        attend = functools.partial(attention.attend, choice=choice)
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(attend)(*given[:3])))

    on_cpu = jax.default_backend() == "cpu"
    names: dict[str, str] = {}
    for choice in attention.CHOICES:
        if choice != "auto" and (choice != "mapped" or on_cpu):
            names.setdefault(program(choice), choice)
    return names.get(program("auto"), "auto"), [*names.values()]


def both_ways(choice: str) -> Callable:
    """(query, key, value, gradient of the output) -> output and three gradients."""

    def run(query, key, value, gradient):
        attend = functools.partial(attention.attend, choice=choice)
        output, backward = jax.vjp(attend, query, key, value)
        return output, *backward(gradient.astype(output.dtype))

    return run


def random(shapes: Any) -> Any:
    """Normal arrays, and weights as of `measure.VALUES`, on the measured devices."""
    whole = sharding.replicated(measure.mesh())
    return measure.filled(
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
            shapes,
        )
    )


def error(found: Any, right: Any) -> float:
    """The relative error of a tree of arrays.

    Raises:
      ArithmeticError: it is not finite, or larger than rounding explains.
    """

    def norm(tree):
        return float(np.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree))))

    difference = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, found, right)
    value = norm(difference) / norm(right)
    if not value < LARGEST_ERROR:
        raise ArithmeticError(f"wrong: the relative error is {value:.2g}")
    return value
