"""Classifiers against PyTorch's on random weights: logits, statistics, gradients.

Ours get one more image than PyTorch's, which is masked.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch

from mvc_jax.checkpoints import classifier_names, weights
from mvc_jax.checkpoints.classifier_checkpoint import TENSORFLOW
from mvc_jax.models import efficientnet, layers
from mvc_jax.models import pyramidnet as pyramidnet_module
from mvc_jax.models import shake_shake as shake_module
from mvc_jax.models.efficientnet import EfficientNet
from mvc_jax.models.pyramidnet import PyramidNet
from mvc_jax.models.resnet import ResNet
from mvc_jax.models.shake_shake import ShakeShake
from mvc_jax.models.wide_resnet import WideResNet

CLASSES, BATCH = 5, 4
STAGES = (
    efficientnet.Stage(1, 3, 1, 16, 1),
    efficientnet.Stage(6, 3, 2, 24, 2),
    efficientnet.Stage(6, 5, 2, 40, 2),
    efficientnet.Stage(6, 5, 1, 112, 1),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A small network, and how its PyTorch reference is made."""

    model: object
    size: int
    reference: Callable  # (the module of references, draws) -> torch.nn.Module


CASES = {
    "cifar_resnet": Case(
        ResNet(CLASSES, depths=(2, 2), width=8, stem="cifar"),
        size=9,
        reference=lambda nets, draws: nets.CifarResNet(CLASSES, 8, 2, 2),
    ),
    "wide_bottlenecks": Case(
        ResNet(CLASSES, depths=(2, 1), width=8, inner=2),
        size=33,
        reference=lambda nets, draws: nets.BottleneckResNet(CLASSES, 8, (2, 1), 2),
    ),
    "wide_resnet": Case(
        WideResNet(CLASSES, depth=16, widen=2),
        size=8,
        reference=lambda nets, draws: nets.WideResNet(CLASSES, 16, 2),
    ),
    "shake_shake": Case(
        ShakeShake(CLASSES, width=8, blocks=2),
        size=8,
        reference=lambda nets, draws: nets.ShakeShake(CLASSES, 8, 2, draws),
    ),
    "pyramidnet": Case(
        PyramidNet(CLASSES, depth=20, alpha=31),
        size=9,
        reference=lambda nets, draws: nets.PyramidNet(CLASSES, 20, 31, draws),
    ),
    "efficientnet": Case(
        EfficientNet(CLASSES, 0.5, dropout=0.0, drop_path=0.5, stages=STAGES),
        size=33,
        reference=lambda nets, draws: nets.EfficientNet(
            CLASSES,
            16,
            640,
            [(1, 3, 1, 8, 1), (6, 3, 2, 16, 2), (6, 5, 2, 24, 2), (6, 5, 1, 56, 1)],
            0.5,
            draws,
        ),
    ),
    "efficientnet_lite": Case(  # its stem and its head are not scaled
        EfficientNet(
            CLASSES,
            0.5,
            dropout=0.0,
            drop_path=0.0,
            stages=STAGES[:2],
            lite=True,
            **TENSORFLOW,
        ),
        size=32,
        reference=lambda nets, draws: nets.as_tensorflow(
            nets.EfficientNet(
                CLASSES,
                32,
                1280,
                [(1, 3, 1, 8, 1), (6, 3, 2, 16, 2)],
                0.0,
                draws,
                lite=True,
            )
        ),
    ),
}


def random_variables(model):
    """Variables that keep activations of order 1; none has its initial value."""
    rng = np.random.default_rng(0)
    shape = jax.ShapeDtypeStruct((1, 2 * model.stride, 2 * model.stride, 3), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), shape)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            scale = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return rng.normal(0, scale, leaf.shape).astype(np.float32)
        low = {"scale": 0.7, "var": 0.5}.get(kind, -0.3)
        return rng.uniform(low, low + 0.7, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def images(size):
    drawn = np.random.default_rng(1).normal(size=(BATCH + 1, size, size, 3))
    return drawn.astype(np.float32)


@pytest.fixture(scope="module")
def networks(torch):
    import torch_classifiers

    return torch_classifiers


@pytest.fixture(scope="module", params=CASES)
def both(request, networks, torch, tmp_path_factory):
    """The results of our network and of PyTorch's, by name."""
    case = CASES[request.param]
    variables, pictures = random_variables(case.model), images(case.size)
    cotangent = np.random.default_rng(2).normal(size=(BATCH, CLASSES))
    cotangent = cotangent.astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        ours = run_ours(case.model, variables, pictures, cotangent, patch)
    path = tmp_path_factory.mktemp("reference") / "model.safetensors"
    weights.write(path, variables, name_of=classifier_names.timm_name)
    drawn = iter([draw[:BATCH] for draw in ours.pop("draws")])

    def draws():
        array = torch.from_numpy(np.array(next(drawn)))
        return array.unbind(1) if array.ndim == 5 else (array,)

    reference = case.reference(networks, draws)
    reference.load_state_dict(safetensors.torch.load_file(path))
    theirs = run_torch(torch, reference, pictures[:BATCH], cotangent)
    assert next(drawn, None) is None  # the same number of draws
    return ours, theirs


def run_ours(model, variables, pictures, cotangent, patch):
    recorded = []

    def record(key, shape):
        recorded.append(uniform(key, shape))
        return recorded[-1]

    uniform = layers.uniform
    for module in (layers, shake_module, pyramidnet_module):
        patch.setattr(module, "uniform", record)
    mask = jnp.arange(BATCH + 1) < BATCH

    # This compiles fast; speed does not matter.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(variables, pictures):
        def trained(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                pictures,
                train=True,
                mask=mask,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(3)},
            )
            logits = logits[:BATCH]
            return jnp.sum(logits * cotangent), (logits, updated["batch_stats"])

        grad = jax.grad(trained, has_aux=True)
        gradients, (logits, updated) = grad(variables["params"])
        draws = list(recorded)
        evaluated = model.apply(variables, pictures)[:BATCH]
        return {
            "eval": evaluated,
            "train": logits,
            "statistics": {"batch_stats": updated},
            "gradients": {"params": gradients},
            "draws": draws,
        }

    found = jax.device_get(run(variables, pictures))
    return found | {kind: by_name(found[kind]) for kind in ("statistics", "gradients")}


def by_name(tree):
    """Arrays in PyTorch's layout, by PyTorch's names."""
    return {
        classifier_names.timm_name(path): weights._to_torch(path[-1], np.asarray(leaf))
        for path, leaf in flax.traverse_util.flatten_dict(tree).items()
    }


def run_torch(torch, reference, pictures, cotangent):
    """The same from PyTorch, with the biased running variances."""
    pictures = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    before = {name: buffer.clone() for name, buffer in reference.named_buffers()}
    counts = {}
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: counts.update(
                    {name: inputs[0].numel() / inputs[0].shape[1]}
                )
            )
    reference.eval()
    with torch.no_grad():
        evaluated = reference(pictures).numpy()
    reference.train()
    logits = reference(pictures)
    (logits * torch.from_numpy(cotangent)).sum().backward()
    statistics = {}
    for name, buffer in reference.named_buffers():
        if name.endswith("running_mean"):
            statistics[name] = buffer.numpy()
        elif name.endswith("running_var"):
            n = counts[name.removesuffix(".running_var")]
            kept = 0.9 * before[name]
            statistics[name] = (kept + (buffer - kept) * (n - 1) / n).numpy()
    return {
        "eval": evaluated,
        "train": logits.detach().numpy(),
        "statistics": statistics,
        "gradients": {n: p.grad.numpy() for n, p in reference.named_parameters()},
    }


@pytest.mark.parametrize("kind", ["eval", "train"])
def test_logits(both, kind):
    ours, theirs = both
    assert np.abs(theirs[kind]).max() > 0.1
    np.testing.assert_allclose(ours[kind], theirs[kind], rtol=1e-4, atol=1e-5)


def test_running_statistics(both):
    ours, theirs = (side["statistics"] for side in both)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_allclose(
            ours[name], expected, rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_gradients(both):
    ours, theirs = (side["gradients"] for side in both)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        atol = 1e-4 * max(np.abs(expected).max(), 1e-2)
        np.testing.assert_allclose(
            ours[name], expected, rtol=1e-4, atol=atol, err_msg=name
        )
