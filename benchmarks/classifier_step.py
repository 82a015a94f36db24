"""The classifier's training step: ours against the same network in PyTorch.

    python benchmarks/classifier_step.py --model=wrn16_4
    python benchmarks/classifier_step.py --model=resnet18
    python benchmarks/classifier_step.py --model=resnet50 --size=64 --batch=50

Forward, backward and an SGD step (Nesterov momentum 0.9, weight decay 5e-4) on images
of `--size` pixels, 10 classes, batch statistics over the examples of a mask (over all
examples in PyTorch, which has no masks). Both have the same precision and a process of
their own with all cores, and alternate, so that other load on the machine affects both.

On an accelerator only ours is measured: WRN-28-10 in bfloat16, with the fraction of the
device's peak (MFU) from the FLOPs of the forward pass (WRN-28-10: 5.25 G multiply-adds,
two FLOPs each) and twice that for the backward pass.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
from turns import accelerator, in_turns, peak, resident, results

CLASSES = 10
B0 = (  # expansion, kernel, stride, channels, layers: table 1 of arXiv 1905.11946
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4


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
    cifar = ("resnet20", "resnet18", "wrn16_4", "wrn28_10", "wrn40_2")
    models = (*cifar, "resnet50", "wide_resnet50_2", "efficientnet_b0")
    default = "wrn28_10" if fast else "wrn16_4"
    parser.add_argument("--model", choices=models, default=default)
    parser.add_argument("--batch", type=int, default=512 if fast else 128)
    parser.add_argument("--size", type=int, default=32, help="pixels along a side")
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
    shape = (arguments.batch, arguments.size, arguments.size, 3)
    images = rng.normal(size=shape).astype(np.float32)
    return images, rng.integers(0, CLASSES, arguments.batch).astype(np.int32)


def options_of(arguments: argparse.Namespace):
    """Our program."""
    import programs

    return programs.Options(
        classifier=arguments.model,
        classifier_size=arguments.size,
        stem="cifar" if arguments.model == "resnet18" else "",
        dtype=arguments.precision,
        batch=arguments.batch,
        policy="none",
        optimizer="sgd",
    )


def ours(arguments: argparse.Namespace) -> tuple[Callable, Callable]:
    """Compiles our step and takes it once; returns `step(times)` and `peak()`."""
    from mvc_jax.training import runtime

    runtime.set_up("")
    import measure
    import programs

    built = programs.build("classify", options_of(arguments), measure.mesh())
    return measure.repeated(*measure.compiled("classify", built)), peak


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
        "resnet20": lambda: torch_classifiers.CifarResNet(CLASSES, 16, 3, 3),
        "resnet18": lambda: torch_classifiers.CifarResNet(CLASSES, 64, 4, 2),
        "resnet50": lambda: torch_classifiers.BottleneckResNet(
            CLASSES, 64, (3, 4, 6, 3), 1
        ),
        "wide_resnet50_2": lambda: torch_classifiers.BottleneckResNet(
            CLASSES, 64, (3, 4, 6, 3), 2
        ),
        "efficientnet_b0": lambda: torch_classifiers.EfficientNet(
            CLASSES, 32, 1280, B0, 0.2, lambda: (torch.rand(arguments.batch, 1, 1, 1),)
        ),
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

    from mvc_jax.training.throughput import peak_tflops

    kind = jax.devices()[0].device_kind
    return forward_flops(options_of(arguments)), peak_tflops(kind)


def forward_flops(options) -> float:
    """FLOPs of one image in the forward pass of a classifier of `programs.Options`."""
    import jax

    from mvc_jax.models import classifiers
    from mvc_jax.training.throughput import count_flops

    model = classifiers.make(options.classifier, num_classes=CLASSES, stem=options.stem)
    side = options.classifier_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return count_flops(model.apply, variables, image)


def seeds(*, at_once: int, **options) -> Iterator[dict]:
    """Rows of `accelerator.py`: seeds one after another, and side by side.

    Args:
      at_once: how many seeds are trained side by side.
      **options: fields of `programs.Options`.
    """
    import measure
    import programs

    rates, name = {}, options["classifier"]
    for count, how in ((1, "one seed after another"), (at_once, "seeds side by side")):
        given = programs.Options(seeds=count, **options)
        built = programs.build("classify", given, measure.mesh())
        run = measure.repeated(*measure.compiled("classify", built))
        rates[count] = count * built.examples / measure.seconds_per_call(run)
        row = measure.rate_row(rates[count], "classify", given)
        row["setting"] = f"{name}, batch {given.batch}, {how}"
        if count > 1:
            row |= {"ratio": rates[count] / rates[1], "ratio_to": "one after another"}
        yield row


if __name__ == "__main__":
    main()
