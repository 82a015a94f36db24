"""Stable Diffusion 1.5, or XL, at its true size: written, loaded, widened, trained.

    python benchmarks/full_size.py --folder=/tmp/sd15
    python benchmarks/full_size.py --folder=/tmp/sdxl --family=sdxl --latents=8

The architecture is that of the public checkpoint, the weights are random. It is written
in the diffusers layout (an existing folder is used), loaded, its UNet widened, and
fine-tuned for some steps, sharded over 8 devices that share the memory of this machine,
or over its accelerators; XL by LoRA, with its frozen UNet in bfloat16. For each part it
prints the seconds, and the peak memory of the process so far.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import resource
import tempfile
import time

DEVICES = 8
if "XLA_FLAGS" not in os.environ:  # before JAX looks for devices
    # XLA's CPU backend, unlike those for accelerators, would sum all gradients at once
    # and keep them whole on every device.
    passes = (
        "all-reduce-combiner",
        "cpu-all-reduce-combiner",
        "optimization-barrier-expander",
        "cse_barrier_expander",
    )
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={DEVICES} "
        f"--xla_disable_hlo_passes={','.join(passes)}"
    )

import flax.traverse_util  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from architectures import write  # noqa: E402

from mvc_jax import finetune  # noqa: E402
from mvc_jax.checkpoints import diffusers_layout, lora_file  # noqa: E402
from mvc_jax.models import lora  # noqa: E402
from mvc_jax.training import optim, rng, runtime, sharding  # noqa: E402
from mvc_jax.training.checkpoint import Checkpoints  # noqa: E402
from mvc_jax.training.loop import create_state, fit  # noqa: E402
from mvc_jax.training.train_logger import TrainLogger  # noqa: E402

GIB = 2**30
_BEGAN = [time.monotonic()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, help="of the checkpoint")
    parser.add_argument("--family", default="sd15", choices=("sd15", "sdxl"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=DEVICES)
    parser.add_argument("--latents", type=int, default=16, help="side; 64 is 512 px")
    parser.add_argument("--remat", default="blocks", help="none, blocks, full")
    arguments = parser.parse_args()
    runtime.set_up("")
    with tempfile.TemporaryDirectory() as temporary:
        workdir = pathlib.Path(temporary)
        base = arguments.folder or workdir / "base"
        report("start")
        if not (base / "model_index.json").exists():
            write(base, arguments.family, {"in_channels": 4})
            report("written")
        train(base, workdir, arguments)


def _placed_in_bfloat16(tree: dict, shardings: dict) -> dict:
    """The tree's leaves on the devices, one after another; the host's are dropped."""
    leaves = flax.traverse_util.flatten_dict(tree)
    tree.clear()
    places = flax.traverse_util.flatten_dict(shardings)
    for key in list(leaves):
        leaf = leaves.pop(key)
        leaf = leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf
        leaves[key] = sharding.place(leaf, places[key])
    return flax.traverse_util.unflatten_dict(leaves)


def report(part: str) -> None:
    """Prints the seconds since the last call, and the peak memory so far."""
    seconds, _BEGAN[0] = time.monotonic() - _BEGAN[0], time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    print(f"{part:32s} {seconds:8.1f} s   peak {peak:6.2f} GiB", flush=True)


def train(folder: pathlib.Path, workdir: pathlib.Path, arguments) -> None:
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    model, params = diffusers_layout.load(folder)
    report(f"loaded {size / GIB:.2f} GiB")
    adapts = arguments.family == "sdxl"
    if adapts:  # only of the cache's making are they needed
        params = {"unet": params["unet"]}
    model, params = model.widened(params)
    mesh = sharding.make_mesh(data=1, fsdp=jax.device_count())
    model = model.with_compute_options(mesh=mesh, remat=arguments.remat)
    schedule = optim.schedule("constant", 1e-4, warmup=0, steps=arguments.steps)
    tx = optim.adam(schedule, max_norm=1.0)
    trained, fixed = params.pop("unet"), {}
    weights = sharding.tree_shardings(trained, mesh)
    if adapts:
        unet, options = trained, {"name_of": lora_file.layer_name, "rank": 4}
        trained = lora.init(unet, rng=np.random.default_rng(2), **options)
        fixed = {"base": _placed_in_bfloat16(unet, weights)}
        del unet
    shardings = sharding.tree_shardings(trained, mesh)
    model = dataclasses.replace(
        model,
        batch_sharding=sharding.batch_sharding(mesh),
        weight_shardings=weights,
    )
    state = create_state(trained, tx, mesh)
    del params, trained
    count = sum(leaf.size for leaf in jax.tree.leaves((state.params, fixed)))
    jax.block_until_ready(state)
    report(f"widened, placed: {count / 1e6:.0f}M on {mesh.size}")
    draw = np.random.default_rng(1)
    side = arguments.latents

    def read(step: int) -> dict:
        shape = (arguments.batch, side, side, 2 * model.latent_channels)
        conditions = model.condition_shapes(arguments.batch)
        return {
            "source_moments": draw.normal(size=shape).astype(np.float32),
            "target_moments": draw.normal(size=shape).astype(np.float32),
            "text_states": jax.tree.map(
                lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), conditions
            ),
        }

    null = jax.tree.map(lambda array: array[0], read(0)["text_states"])
    if adapts:
        del null["time_ids"]
    state = fit(
        functools.partial(
            finetune.train_step,
            model=model,
            tx=tx,
            schedule=schedule,
            key=rng.purpose_key(0, "finetune"),
            drop_rate=0.05,
            shardings=shardings,
        ),
        state,
        read=read,
        constants=fixed | {"null_states": null},
        mesh=mesh,
        steps=arguments.steps,
        checkpoints=Checkpoints(workdir / "checkpoints", every=10**9),
        logger=TrainLogger(
            workdir,
            "steps",
            log_every=1,
            flops=finetune.step_flops(model, "lora" if adapts else "full", side, side),
        ),
    )
    report(f"compiled, {arguments.steps} steps, saved")
    layer = state.params["conv_in"]
    new = layer["b"] if adapts else layer["kernel"][:, :, 4:]  # both began as zeros
    moved = np.abs(np.asarray(new)).max()
    print((workdir / "metrics.jsonl").read_text(), end="")
    assert int(state.step) == arguments.steps and moved > 0


if __name__ == "__main__":
    main()
