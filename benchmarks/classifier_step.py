"""The classifier's training step: ours against the same network in PyTorch.

    python benchmarks/classifier_step.py --model=wrn16_4
    python benchmarks/classifier_step.py --model=resnet18

Forward, backward and an SGD step (Nesterov momentum 0.9, weight decay 5e-4) on 32 px
images, 10 classes, batch statistics over the examples of a mask (over all examples in
PyTorch, which has no masks). Both have the same precision and a process of their own
with all cores, and alternate, so that other load on the machine affects both.

On an accelerator only ours is measured: WRN-28-10 in bfloat16, with the fraction of the
device's peak (MFU) from the FLOPs of the forward pass (WRN-28-10: 5.25 G multiply-adds,
two FLOPs each) and twice that for the backward pass.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable

import numpy as np
from turns import accelerator, in_turns, peak, resident, results

SIZE, CLASSES = 32, 10
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
FIELDS = {"resnet18": {"stem": "cifar"}}


def main() -> None:
    fast = accelerator()
    arguments = parse(fast)
    sides = {"ours": ours} if fast else {"ours": ours, "torch": theirs}
    compiling, seconds, memory = in_turns(sides, arguments)
    print(results(arguments, compiling, seconds, memory))
    if fast:
        print(rate(arguments, float(np.median(seconds["ours"]))))


def parse(fast: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    models = ("wrn16_4", "resnet18", "wrn28_10", "wrn40_2")
    default = "wrn28_10" if fast else "wrn16_4"
    parser.add_argument("--model", choices=models, default=default)
    parser.add_argument("--batch", type=int, default=512 if fast else 128)
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="bfloat16" if fast else "float32",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side")
    parser.add_argument(
        "--steps", type=int, default=20 if fast else 2, help="per round"
    )
    return parser.parse_args()


def data(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Random images [B, H, W, 3] and labels."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(arguments.batch, SIZE, SIZE, 3)).astype(np.float32)
    return images, rng.integers(0, CLASSES, arguments.batch).astype(np.int32)


def network(arguments: argparse.Namespace):
    """Our network."""
    from mvc_jax.models.classifiers import VARIANTS

    fields = FIELDS.get(arguments.model, {}) | {"dtype": arguments.precision}
    return VARIANTS[arguments.model].make(num_classes=CLASSES, **fields)


def ours(arguments: argparse.Namespace) -> tuple[Callable, Callable]:
    """Compiles our step and takes it once; returns `step(times)` and `peak()`."""
    from mvc_jax.training import runtime

    runtime.set_up("")
    import jax
    import optax

    model = network(arguments)
    tx = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(LEARNING_RATE, MOMENTUM, nesterov=True),
    )
    images, labels = map(jax.device_put, data(arguments))
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    state = (variables, jax.jit(tx.init)(variables["params"]))
    mask = jax.device_put(np.ones(arguments.batch, bool))

    @functools.partial(jax.jit, donate_argnums=0)
    def step_fn(state, images, labels, mask):
        variables, opt_state = state

        def loss_fn(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                images,
                train=True,
                mask=mask,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        params = variables["params"]
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return ({"params": params, "batch_stats": stats}, opt_state), loss

    state, loss = jax.block_until_ready(step_fn(state, images, labels, mask))

    def step(times: int) -> None:
        nonlocal state, loss
        for _ in range(times):
            state, loss = step_fn(state, images, labels, mask)
        assert np.isfinite(float(loss))
        jax.block_until_ready(state)

    return step, peak


def theirs(arguments: argparse.Namespace) -> tuple[Callable, Callable]:
    """The same for PyTorch."""
    import torch

    sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
    import torch_classifiers

    torch.manual_seed(0)
    model = {
        "wrn16_4": lambda: torch_classifiers.WideResNet(CLASSES, 16, 4),
        "wrn28_10": lambda: torch_classifiers.WideResNet(CLASSES, 28, 10),
        "wrn40_2": lambda: torch_classifiers.WideResNet(CLASSES, 40, 2),
        "resnet18": lambda: torch_classifiers.CifarResNet(CLASSES, 64, 4, 2),
    }[arguments.model]()
    optimizer = torch.optim.SGD(
        model.parameters(),
        LEARNING_RATE,
        MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        nesterov=True,
    )
    images, labels = data(arguments)
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(labels).long()
    half = torch.autocast(
        "cpu", torch.bfloat16, enabled=arguments.precision == "bfloat16"
    )

    def step(times: int) -> None:
        for _ in range(times):
            with half:
                logits = model(images)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert np.isfinite(loss.item())

    step(1)
    return step, resident


def rate(arguments: argparse.Namespace, seconds: float) -> str:
    """TFLOP/s and MFU of one device; FLOPs are counted in another process."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        flops, peak = pool.apply(_flops_and_peak, (arguments,))
    tflops = 3 * flops * arguments.batch / seconds / 1e12
    mfu = f", {tflops / peak:.1%} of its peak" if peak else ""
    return f"\n{flops / 1e9:.2f} GFLOP per image forward: {tflops:.0f} TFLOP/s{mfu}"


def _flops_and_peak(arguments: argparse.Namespace) -> tuple[float, float | None]:
    import jax

    from mvc_jax.training.throughput import count_flops, peak_tflops

    model = network(arguments)
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    flops = count_flops(model.apply, variables, image)
    return flops, peak_tflops(jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
