"""Times the programs of the stages, and makes the rows of `accelerator.py`."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import classifier_step
import jax
import jax.numpy as jnp
import numpy as np
import programs
from turns import noise, peak, seconds_per_call

from mvc_jax import finetune
from mvc_jax.training import memory, runtime, sharding, throughput

# Parts of the paths of arguments -> how these are drawn; the first match is used.
# Weights have the variances of the standard initialisers, so that activations stay
# finite over many layers and steps.
VALUES: tuple[tuple[str, Callable], ...] = (
    (r"opt_state|skipped|step$|redraws$", lambda key, shape: jnp.zeros(shape)),
    (r"(weight|scale|var)$", lambda key, shape: jnp.ones(shape)),
    (r"(bias|mean)$", lambda key, shape: jnp.zeros(shape)),
    (r"rates$", lambda key, shape: jnp.full(shape, 1e-3)),
    (r"kernel$", lambda key, shape: normal(key, shape, np.prod(shape[:-1]) ** -0.5)),
    (r"embedding$", lambda key, shape: normal(key, shape, 0.02)),
    (r"labels$", lambda key, shape: jax.random.randint(key, shape, 0, 10)),
    (r"index$", lambda key, shape: jax.random.randint(key, shape, 0, 10_000)),
    (r"/key$", jax.random.bits),
    (r"pixels$", lambda key, shape: jax.random.randint(key, shape, 0, 256)),
    (r"", lambda key, shape: normal(key, shape, 1.0)),
)


def normal(key: jax.Array, shape: tuple[int, ...], deviation: float) -> jax.Array:
    return deviation * jax.random.normal(key, shape)


def mesh() -> jax.sharding.Mesh:
    """One accelerator; or all CPU devices."""
    runtime.start()
    devices = jax.devices()
    one = devices[0].platform != "cpu"
    return sharding.make_mesh(devices=devices[:1] if one else devices)


def filled(shapes: Any) -> Any:
    """Arrays for a tree of shapes with shardings, drawn on the devices by `VALUES`."""
    draws: dict[Any, Callable] = {}  # few leaves differ in rule and shape
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    def one(number, path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(number), leaf.sharding)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = "pixels" if leaf.dtype == jnp.uint8 else name
        draw = next(draw for rule, draw in VALUES if re.search(rule, name))
        kind = (draw, leaf.shape, leaf.dtype, leaf.sharding)
        if kind not in draws:
            draws[kind] = jax.jit(
                lambda seed: draw(jax.random.key(seed), leaf.shape).astype(leaf.dtype),
                out_shardings=leaf.sharding,
            )
        return draws[kind](number)

    found = [one(number, *leaf) for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, found)


def seconds_of(function: Callable, *arguments: Any) -> float:
    """Median seconds of a call of a function, once it is compiled."""

    def run(times: int) -> None:
        for _ in range(times):
            found = function(*arguments)
        jax.block_until_ready(found)

    run(1)
    return seconds_per_call(run)


def row(setting: str, figure: float, unit: str, **more: Any) -> dict[str, Any]:
    """A row of the table, with memory and seconds of compilation of this process.

    Args:
      setting: of the figure.
      figure: what was measured.
      unit: of it.
      **more: `tflops`, from which the MFU follows; `record` or `ratio` and `ratio_to`;
        `note`.
    """
    found = {"setting": setting, "figure": figure, "unit": unit, **more}
    if (spread := noise()) is not None:
        found["noise"] = spread
    best = throughput.peak_tflops(jax.devices()[0].device_kind)
    if best and "tflops" in more:
        found["mfu"] = more["tflops"] / best
    found["memory_gib"] = peak() / 2**30
    found["compile_seconds"] = runtime.compile_seconds()
    return found


def rate(name: str, *, record: float = 0, **options: Any) -> Iterator[dict]:
    """The examples per second of one of `programs.PROGRAMS`.

    Args:
      name: its name.
      record: the rate to compare with; 0: there is none.
      **options: fields of `programs.Options`.
    """
    more = {"record": record} if record else {}
    given = programs.Options(**options)
    built = programs.build(name, given, mesh())
    seconds = seconds_per_call(repeated(*compiled(name, built)))
    yield rate_row(built.examples / seconds, name, given, **more)


def rate_row(
    rate: float, name: str, options: programs.Options, **more: Any
) -> dict[str, Any]:
    """The row of a rate in examples/s of a program; its setting is the run's."""
    unit = "examples/s" if name in ("finetune", "classify") else "images/s"
    tflops = 1e-12 * rate * flops(name, options)
    return row(more.pop("setting", ""), rate, unit, tflops=tflops, **more)


def compiled(name: str, built: programs.Program) -> tuple[Callable, tuple]:
    """A program, compiled if it fits the memory, and random arguments."""
    arguments = filled(built.arguments)
    budget = memory.MemoryBudget(0, "Lower the batch.")
    return budget.compile(built.function, *arguments, name=name), arguments


def repeated(call: Callable, arguments: tuple) -> Callable[[int], None]:
    """A function that makes so many calls; the first one is made here.

    A program whose first argument is a training state returns the next one, and `loss`
    among its metrics.
    """
    steps = hasattr(arguments[0], "opt_state")

    def run(times: int) -> None:
        nonlocal arguments
        for _ in range(times):
            found = call(*arguments)
            if steps:
                arguments = (found[0], *arguments[1:])
        jax.block_until_ready(found)
        if steps and not np.isfinite(loss := np.asarray(found[1]["loss"])).all():
            raise FloatingPointError(f"the loss is {loss}")

    run(1)
    return run


def flops(name: str, options: programs.Options) -> float:
    """FLOPs of an example, without recomputed activations and without augmentation."""
    if name == "classify":
        return 3 * classifier_step.forward_flops(options)
    if name == "finetune":
        model = programs.architecture(options)
        side = options.size // model.downsampling
        return finetune.step_flops(model, "full", side, side)
    here = mesh()
    plain = dataclasses.replace(options, batch=here.size, attention="xla")
    built = programs.build(name, plain, here)
    return built.flops() / built.examples


def lowered(name: str, **options: Any) -> Iterator[dict]:
    """Lowers a program from shapes alone, for the devices that are there."""
    built = programs.build(name, programs.Options(**options), mesh())
    began = time.perf_counter()
    built.function.lower(*built.arguments)
    yield row("", time.perf_counter() - began, "s to lower")
