"""Classifier checkpoints: read in three libraries' layouts, written in timm's.

`save_as` writes a network as timm, torchvision or transformers would.
"""

import functools
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from PIL import Image
from test_classifier_parity import images, random_variables

from mvc_jax.checkpoints import (
    classifier_card,
    classifier_checkpoint,
    classifier_export,
    classifier_names,
    classifier_weights,
)
from mvc_jax.data import decode
from mvc_jax.errors import UserError
from mvc_jax.models import efficientnet
from mvc_jax.models.classifiers import VARIANTS
from mvc_jax.models.efficientnet import EfficientNet
from mvc_jax.models.resnet import ResNet
from mvc_jax.models.wide_resnet import WideResNet

CLASSES = ("heron", "ibis", "stork")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
RESNET = ResNet(3, depths=(1, 2), width=8)
BOTTLENECKS = ResNet(3, depths=(1, 2), width=8, inner=1)
STAGES = efficientnet.STAGES[:3]
EFFICIENT = EfficientNet(3, 0.5, dropout=0.0, drop_path=0.0, stages=STAGES)
TENSORFLOW = EFFICIENT.clone(**classifier_checkpoint.TENSORFLOW)
LITE = TENSORFLOW.clone(lite=True)
OPTIONS = {"xla_backend_optimization_level": 0}


def preprocessing(size=36, resize="stretch", resample="lanczos", data_size=0):
    return classifier_card.Preprocessing(
        resize, resample, data_size or size, size, MEAN, STD
    )


def export(folder, model, variant=None, variables=None, classes=CLASSES, **done):
    """Writes a network by `classifier_export`."""
    variant = variant or ("efficientnet_b0" if "Eff" in repr(model) else "resnet18")
    if getattr(model, "lite", False):
        variant = "efficientnet_lite0"
    variables = random_variables(model) if variables is None else variables
    classifier_export.write(
        folder,
        model,
        variables,
        variant=variant,
        class_names=classes,
        preprocessing=preprocessing(**done),
    )
    return variables


def save_as(library, folder, model, **options):
    """Writes a network with the names and the config of a library."""
    variables = export(folder, model, **options)
    if library == "timm":
        return variables
    family = classifier_names.family_of(model)
    naming = classifier_names.naming(library, family)
    depths = model.depths() if family == "EfficientNet" else ()
    tensors = {
        naming.name(name, depths): tensor for name, tensor in stored(folder).items()
    }
    store(folder, tensors)
    if library == "transformers":
        config = transformers_config(model, options.get("classes", CLASSES))
        (folder / "config.json").write_text(json.dumps(config))
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": 36, "width": 36},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": MEAN,
            "image_std": STD,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return variables


def transformers_config(model, classes):
    labels = {str(index): name for index, name in enumerate(classes)}
    family = classifier_names.family_of(model)
    shared = {
        "architectures": [f"{family}ForImageClassification"],
        "model_type": family.lower(),
        "num_channels": 3,
        "id2label": labels,
        "label2id": {name: int(index) for index, name in labels.items()},
    }
    if family == "ResNet":
        expansion = 4 if model.inner else 1
        stages = range(len(model.depths))
        return {
            **shared,
            "layer_type": "bottleneck" if model.inner else "basic",
            "embedding_size": model.width,
            "depths": model.depths,
            "hidden_sizes": [expansion * model.width * 2**stage for stage in stages],
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
        }
    expand, sizes, strides, widths, depths = map(list, zip(*model.stages, strict=True))
    return {
        **shared,
        "image_size": 36,
        "width_coefficient": model.width,
        "depth_coefficient": model.depth,
        "kernel_sizes": sizes,
        "in_channels": [32, *widths[:-1]],
        "out_channels": widths,
        "depthwise_padding": [3],  # strides over 9 pixels, an odd number
        "strides": strides,
        "num_block_repeats": depths,
        "expand_ratios": expand,
        "squeeze_expansion_ratio": 0.25,
        "hidden_act": "swish",
        "hidden_dim": model.scaled(1280),
        "pooling_type": "mean",
        "batch_norm_eps": model.epsilon,
        "batch_norm_momentum": 0.1,
        "dropout_rate": 0.0,
        "drop_connect_rate": 0.0,
    }


def stored(path):
    return safetensors.numpy.load_file(path / "model.safetensors")


def store(path, tensors):
    safetensors.numpy.save_file(tensors, path / "model.safetensors", {"format": "pt"})


def find(path):
    return classifier_checkpoint.find(str(path), field="config.classify.pretrained")


def read(path, model):
    return classifier_weights.read(find(path), model)


def without_head(variables):
    params = dict(variables["params"])
    for name in ("fc", "classifier"):
        params.pop(name, None)
    return {**variables, "params": params}


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize(
    ("library", "model"),
    [
        ("timm", RESNET),
        ("timm", BOTTLENECKS),
        ("timm", EFFICIENT),
        ("timm", TENSORFLOW),
        ("timm", LITE),
        ("torchvision", EFFICIENT),
        ("transformers", RESNET),
        ("transformers", BOTTLENECKS),
        ("transformers", TENSORFLOW),
    ],
)
def test_a_round_trip_is_exact(tmp_path, model, library):
    variables = save_as(library, tmp_path, model)
    found = find(tmp_path)
    assert found.num_classes == 3 and found.size == 36
    np.testing.assert_allclose([found.mean, found.std], [MEAN, STD], rtol=1e-12)
    fields = {key: getattr(model, key) for key in found.fields}
    assert fields == found.fields
    assert ("padding" in fields) == (model in (TENSORFLOW, LITE))
    again, unused = classifier_weights.read(found, model)
    assert_equal(again, without_head(variables))
    head = found.naming.head
    assert unused == (f"{head}.bias", f"{head}.weight")
    written = variables["params"][classifier_weights.head_name(model)]
    np.testing.assert_array_equal(stored(tmp_path)[f"{head}.bias"], written["bias"])
    np.testing.assert_array_equal(
        stored(tmp_path)[f"{head}.weight"].T, written["kernel"]
    )


@pytest.mark.parametrize(
    ("model", "kind"),
    [(RESNET, "ResNet"), (BOTTLENECKS, "ResNet"), (TENSORFLOW, "EfficientNet")],
    ids=["basic", "bottleneck", "efficientnet"],
)
def test_our_network_computes_what_transformers_does(torch, tmp_path, model, kind):
    import transformers

    variables = save_as("transformers", tmp_path, model)
    network, report = getattr(
        transformers, f"{kind}ForImageClassification"
    ).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    pictures = images(36)
    rows = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        expected = network.eval()(rows).logits.numpy()
        trained = network.train()(rows).logits.numpy()

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def run(variables, pictures):
        logits, _ = model.apply(variables, pictures, True, mutable=["batch_stats"])
        return model.apply(variables, pictures), logits

    ours = run(variables, jnp.asarray(pictures))
    for actual, wanted in zip(ours, (expected, trained), strict=True):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(
        tmp_path, use_fast=False
    )
    pixels = np.full((36, 36, 3), 51, np.uint8)
    normalised = processor(pixels, return_tensors="np")["pixel_values"][0, :, 0, 0]
    found = find(tmp_path)
    wanted = (0.2 - np.array(found.mean)) / np.array(found.std)
    np.testing.assert_allclose(normalised, wanted, rtol=1e-5)


# The libraries' own state dictionaries: the number of tensors, and some of them.
PUBLISHED = [
    (
        "resnet18",
        "timm",
        122,
        {
            "conv1.weight": (64, 3, 7, 7),
            "bn1.running_var": (64,),
            "bn1.num_batches_tracked": (),
            "layer1.0.conv1.weight": (64, 64, 3, 3),
            "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer2.0.downsample.1.bias": (128,),
            "layer4.1.bn2.weight": (512,),
            "fc.weight": (1000, 512),
            "fc.bias": (1000,),
        },
    ),
    (
        "wide_resnet50_2",
        "torchvision",
        320,
        {
            "layer1.0.conv1.weight": (128, 64, 1, 1),
            "layer1.0.conv2.weight": (128, 128, 3, 3),
            "layer1.0.conv3.weight": (256, 128, 1, 1),
            "layer1.0.downsample.0.weight": (256, 64, 1, 1),
            "layer4.2.conv3.weight": (2048, 1024, 1, 1),
            "fc.weight": (1000, 2048),
        },
    ),
    (
        "resnet50",
        "transformers",
        320,
        {
            "resnet.embedder.embedder.convolution.weight": (64, 3, 7, 7),
            "resnet.embedder.embedder.normalization.running_mean": (64,),
            "resnet.encoder.stages.0.layers.0.shortcut.convolution.weight": (
                256,
                64,
                1,
                1,
            ),
            "resnet.encoder.stages.3.layers.2.layer.1.convolution.weight": (
                512,
                512,
                3,
                3,
            ),
            "resnet.encoder.stages.3.layers.2.layer.2.normalization.bias": (2048,),
            "classifier.1.weight": (1000, 2048),
        },
    ),
    (
        "efficientnet_b0",
        "timm",
        360,
        {
            "conv_stem.weight": (32, 3, 3, 3),
            "blocks.0.0.conv_dw.weight": (32, 1, 3, 3),
            "blocks.0.0.se.conv_reduce.weight": (8, 32, 1, 1),
            "blocks.0.0.conv_pw.weight": (16, 32, 1, 1),
            "blocks.0.0.bn2.weight": (16,),
            "blocks.1.0.conv_pw.weight": (96, 16, 1, 1),
            "blocks.1.0.se.conv_expand.bias": (96,),
            "blocks.1.0.conv_pwl.weight": (24, 96, 1, 1),
            "blocks.6.0.bn3.running_mean": (320,),
            "conv_head.weight": (1280, 320, 1, 1),
            "bn2.weight": (1280,),
            "classifier.weight": (1000, 1280),
        },
    ),
    (
        "efficientnet_lite0",
        "timm",
        296,
        {
            "conv_stem.weight": (32, 3, 3, 3),
            "blocks.0.0.conv_pw.weight": (16, 32, 1, 1),
            "blocks.1.0.conv_pwl.weight": (24, 96, 1, 1),
            "blocks.5.3.conv_dw.weight": (1152, 1, 5, 5),
            "conv_head.weight": (1280, 320, 1, 1),
            "classifier.weight": (1000, 1280),
        },
    ),
    (
        "efficientnet_b0",
        "torchvision",
        360,
        {
            "features.0.0.weight": (32, 3, 3, 3),
            "features.0.1.running_var": (32,),
            "features.1.0.block.0.0.weight": (32, 1, 3, 3),
            "features.1.0.block.1.fc1.weight": (8, 32, 1, 1),
            "features.1.0.block.2.0.weight": (16, 32, 1, 1),
            "features.2.0.block.0.0.weight": (96, 16, 1, 1),
            "features.2.0.block.1.0.weight": (96, 1, 3, 3),
            "features.2.0.block.2.fc2.bias": (96,),
            "features.2.1.block.3.1.weight": (24,),
            "features.7.0.block.3.0.weight": (320, 1152, 1, 1),
            "features.8.0.weight": (1280, 320, 1, 1),
            "classifier.1.weight": (1000, 1280),
        },
    ),
    (
        "efficientnet_b0",
        "transformers",
        360,
        {
            "efficientnet.embeddings.convolution.weight": (32, 3, 3, 3),
            "efficientnet.embeddings.batchnorm.weight": (32,),
            "efficientnet.encoder.blocks.0.depthwise_conv.depthwise_conv.weight": (
                32,
                1,
                3,
                3,
            ),
            "efficientnet.encoder.blocks.15.expansion.expand_conv.weight": (
                1152,
                192,
                1,
                1,
            ),
            "efficientnet.encoder.blocks.15.squeeze_excite.reduce.weight": (
                48,
                1152,
                1,
                1,
            ),
            "efficientnet.encoder.top_bn.bias": (1280,),
            "classifier.weight": (1000, 1280),
        },
    ),
]


@pytest.mark.parametrize(("variant", "library", "count", "some"), PUBLISHED)
def test_names_and_shapes_are_the_library_s(variant, library, count, some, tmp_path):
    model = VARIANTS[variant].make(num_classes=1000)
    if library == "transformers" and variant.startswith("eff"):
        model = model.clone(**classifier_checkpoint.TENSORFLOW)
    shapes = classifier_weights.variable_shapes(model)
    zeros = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes
    )
    save_as(
        library,
        tmp_path,
        model,
        variant=variant,
        variables=zeros,
        classes=[str(index) for index in range(1000)],
    )
    found = find(tmp_path)
    assert (found.variant, found.num_classes) == (variant, 1000)
    with (tmp_path / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    del header["__metadata__"]
    assert len(header) == count
    for name, shape in some.items():
        assert tuple(header[name]["shape"]) == shape, name
        kind = "I64" if name.endswith("num_batches_tracked") else "F32"
        assert header[name]["dtype"] == kind


def test_timm_s_config(tmp_path):
    export(tmp_path, VARIANTS["efficientnet_b0"].make(num_classes=3), variables={})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "efficientnet_b0"
    assert config["num_classes"] == 3 and config["label_names"] == list(CLASSES)
    cfg = config["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"]) == (list(MEAN), list(STD))
    assert (cfg["input_size"], cfg["classifier"]) == ([3, 36, 36], "classifier")
    export(
        tmp_path,
        VARIANTS["efficientnet_b0"].make(3, **classifier_checkpoint.TENSORFLOW),
        variables={},
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "tf_efficientnet_b0"


def test_a_network_that_timm_does_not_have(tmp_path):
    model = WideResNet(3, depth=10, widen=2)
    variables = export(tmp_path, model, variant="wrn16_4")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "mvc_jax_wrn16_4"
    found = find(tmp_path)
    assert (found.variant, found.fields) == ("wrn16_4", {"depth": 10, "widen": 2})
    again, unused = classifier_weights.read(found, model)
    assert_equal(again, without_head(variables))
    assert unused == ("fc.bias", "fc.weight")
    with pytest.raises(UserError, match="looks like mvc_jax_wrn16_4"):
        classifier_weights.read(found, RESNET)


def test_the_cifar_stem_is_kept_as_a_field(tmp_path):
    model = ResNet(3, depths=(1, 2), width=8, stem="cifar")
    export(tmp_path, model)
    found = find(tmp_path)
    assert found.fields["stem"] == "cifar"
    with pytest.raises(UserError, match=r"conv1.weight has shape \[3, 3, 3, 8\]"):
        classifier_weights.read(found, RESNET)


def test_a_head_of_other_classes_is_not_read(tmp_path):
    variables = export(tmp_path, RESNET)
    again, unused = read(tmp_path, RESNET.clone(num_classes=7))
    assert_equal(again, without_head(variables))
    assert unused == ("fc.bias", "fc.weight")


def test_a_transformers_checkpoint_without_a_head(tmp_path):
    variables = save_as("transformers", tmp_path, TENSORFLOW)
    tensors = {
        name.removeprefix("efficientnet."): tensor
        for name, tensor in stored(tmp_path).items()
        if not name.startswith("classifier")
    }
    store(tmp_path, tensors)
    assert find(tmp_path).num_classes == 0
    again, unused = read(tmp_path, TENSORFLOW)
    assert unused == ()
    assert_equal(again, without_head(variables))


def test_half_precision_is_read_as_float32(tmp_path):
    variables = export(tmp_path, RESNET)
    halved = {
        name: tensor.astype(np.float16) if tensor.dtype == np.float32 else tensor
        for name, tensor in stored(tmp_path).items()
    }
    store(tmp_path, halved)
    again, _ = read(tmp_path, RESNET)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {np.dtype(np.float32)}
    close = functools.partial(np.testing.assert_allclose, atol=2e-3)
    jax.tree.map(close, again, without_head(variables))


def test_unknown_modules_are_skipped_and_listed(tmp_path):
    export(tmp_path, RESNET)
    store(tmp_path, stored(tmp_path) | {"aux.0.weight": np.zeros(3, np.float32)})
    _, unused = read(tmp_path, RESNET)
    assert unused == ("aux.0.weight", "fc.bias", "fc.weight")


def test_an_unknown_tensor_inside_the_network_is_an_error(tmp_path):
    export(tmp_path, RESNET)
    name = "layer1.0.se.fc1.weight"
    store(tmp_path, stored(tmp_path) | {name: np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=f"{name} is unexpected"):
        read(tmp_path, RESNET)


def test_missing_and_misshapen_tensors_are_listed(tmp_path):
    export(tmp_path, RESNET)
    tensors = stored(tmp_path)
    del tensors["layer2.1.bn2.running_var"]
    tensors["layer2.1.bn2.bias"] = np.zeros(5, np.float32)
    store(tmp_path, tensors)
    with pytest.raises(UserError) as error:
        read(tmp_path, RESNET)
    assert "layer2.1.bn2.running_var is missing" in str(error.value)
    assert "layer2.1.bn2.bias has shape [5], not [16]" in str(error.value)


@pytest.mark.parametrize(
    ("other", "looks"),
    [
        (RESNET.clone(depths=(1, 3)), "a ResNet of 1, 3 basic blocks, 8 channels wide"),
        (RESNET.clone(width=16), "a ResNet of 1, 2 basic blocks, 16 channels wide"),
        (BOTTLENECKS, "a ResNet of 1, 2 bottlenecks, 8 channels wide"),
        (EFFICIENT, "an EfficientNet of 5 blocks, 16 channels in its stem and 640 at"),
        (LITE, "an EfficientNet-Lite of 5 blocks, 32 channels in its stem and 1280 at"),
    ],
    ids=["deeper", "wider", "bottlenecks", "efficientnet", "lite"],
)
def test_another_architecture_is_refused(tmp_path, other, looks):
    export(tmp_path, other)
    with pytest.raises(UserError) as error:
        read(tmp_path, RESNET)
    assert f"got one that looks like {looks}" in str(error.value)
    assert "wanted a ResNet of 1, 2 basic blocks, 8 channels wide" in str(error.value)


def test_another_kind_of_network_is_refused(tmp_path):
    store(tmp_path, {"patch_embed.proj.weight": np.zeros((4, 3, 2, 2), np.float32)})
    with pytest.raises(UserError, match="another network, with tensors patch_embed"):
        find(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny"}')
    with pytest.raises(UserError, match="got vit_tiny, with tensors patch_embed"):
        find(tmp_path)


def set_config(folder, file="config.json", **fields):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_configs_of_unsupported_networks_are_refused(tmp_path):
    save_as("transformers", tmp_path / "a", RESNET)
    set_config(tmp_path / "a", downsample_in_bottleneck=True)
    with pytest.raises(UserError, match="got downsample_in_bottleneck True"):
        find(tmp_path / "a")
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    set_config(tmp_path / "a", downsample_in_bottleneck=False)
    with pytest.raises(UserError, match="wanted preprocessor_config.json"):
        find(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(UserError, match="bad JSON"):
        find(tmp_path / "a")
    export(tmp_path / "b", EFFICIENT)
    (tmp_path / "b" / "config.json").unlink()
    with pytest.raises(UserError, match="wanted timm's config.json"):
        find(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text('{"architecture": "mvc_jax_nope"}')
    with pytest.raises(
        UserError, match="an architecture of mvc_jax: resnet8, .* 'nope'"
    ):
        find(tmp_path / "b")


def test_an_architecture_with_the_tensors_of_another(tmp_path):
    model = VARIANTS["resnet18"].make(num_classes=3)
    zeros = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape),
        classifier_weights.variable_shapes(model),
    )
    export(tmp_path, model, variables=zeros)
    set_config(tmp_path, architecture="resnetblur18")
    with pytest.raises(UserError, match="of its tensors, resnet18, .* 'resnetblur18'"):
        find(tmp_path)


def test_a_single_file_of_torchvision_has_imagenet_s_normalisation(tmp_path):
    save_as("torchvision", tmp_path, EFFICIENT)
    (tmp_path / "model.safetensors").rename(tmp_path / "efficientnet.safetensors")
    found = find(tmp_path / "efficientnet.safetensors")
    assert (found.naming.library, found.fields) == ("torchvision", {})
    assert (found.mean, found.std) == (
        classifier_checkpoint.MEAN,
        (0.229, 0.224, 0.225),
    )


@pytest.mark.parametrize(
    "name", ["EfficientNetImageProcessor", "ConvNextImageProcessor"]
)
@pytest.mark.parametrize("include_top", [True, False, None])
@pytest.mark.parametrize("offset", [True, False])
def test_the_normalisation_is_the_processor_s(
    torch, tmp_path, name, include_top, offset
):
    import transformers

    save_as("transformers", tmp_path, TENSORFLOW)
    fields = {"image_processor_type": name, "size": {"height": 36, "width": 36}}
    if name.startswith("Conv"):
        fields["size"] = {"shortest_edge": 384}
    else:
        fields |= {"rescale_offset": offset, "rescale_factor": 1 / 127.5}
        fields |= {} if include_top is None else {"include_top": include_top}
    set_config(tmp_path, "preprocessor_config.json", **fields)
    found = find(tmp_path)
    processor = getattr(transformers, name).from_pretrained(tmp_path)
    pixels = np.full((36, 36, 3), 102, np.uint8)
    theirs = processor(pixels, return_tensors="np")["pixel_values"][0, :, 0, 0]
    ours = (0.4 - np.array(found.mean)) / np.array(found.std)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_hub_name_is_downloaded(tmp_path, monkeypatch):
    export(tmp_path, RESNET)
    calls = []

    def download(name, patterns, *, field, revision):
        calls.append((name, tuple(patterns), field, revision))
        return epath.Path(tmp_path)

    monkeypatch.setattr(classifier_checkpoint.hub, "download", download)
    found = classifier_checkpoint.find("timm/resnet18.a1_in1k", field="f", revision="r")
    assert found.num_classes == 3
    ((name, patterns, field, revision),) = calls
    assert (name, field, revision) == ("timm/resnet18.a1_in1k", "f", "r")
    assert {"model.safetensors", "config.json"} <= set(patterns)
    assert not any("bin" in pattern for pattern in patterns)


@pytest.mark.parametrize("file", ["pytorch_model.bin", None])
def test_a_folder_without_safetensors(tmp_path, file):
    if file:
        (tmp_path / file).write_bytes(b"pickle")
    match = "A pickle is never opened" if file else "got nothing there"
    with pytest.raises(UserError, match=match):
        find(tmp_path)


def test_timm_names_of_all_variables():
    found = {
        classifier_names.timm_name(path)
        for path in flax.traverse_util.flatten_dict(
            classifier_weights.variable_shapes(EFFICIENT)
        )
    }
    assert "blocks.0.0.se.conv_reduce.bias" in found
    assert "bn1.running_mean" in found and "bn1.num_batches_tracked" not in found


@pytest.mark.parametrize("resize", classifier_card.CROP_MODES)
@pytest.mark.parametrize("data_size", [32, 48])
@pytest.mark.parametrize("resample", ["lanczos", "area"])
def test_the_preprocessing_travels_with_it(
    tmp_path, monkeypatch, resize, resample, data_size
):
    """The lines in the card are exact; `benchmarks/consumers.sh` compares timm's."""
    export(
        tmp_path, RESNET, size=32, resize=resize, resample=resample, data_size=data_size
    )
    config = json.loads((tmp_path / "config.json").read_text())
    crop_mode = {"stretch": "squash", "crop": "center", "pad": "border"}[resize]
    assert config["pretrained_cfg"]["crop_mode"] == crop_mode
    assert config["pretrained_cfg"]["crop_pct"] == 1.0
    assert config["mvc_jax"].get("fill") == ([0, 0, 0] if resize == "pad" else None)
    card = (tmp_path / "README.md").read_text()
    assert "import timm" not in card and "--config.classify.pretrained" in card
    done = preprocessing(32, resize, resample, data_size)
    of_timm = classifier_card.text(config, done, in_timm=True)
    assert ("fill = (0, 0, 0)" in of_timm) == (resize == "pad")
    image = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(card.split("```python\n")[-1].split("```")[0], scope)
    pixels = decode.fit(image, data_size, resize=resize, resample=resample)
    pixels = decode.fit(pixels, 32, resample="area")
    wanted = (pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    np.testing.assert_array_equal(scope["pixels"][0], wanted.transpose(2, 0, 1))


# People's own files.


@pytest.mark.parametrize(
    ("library", "model"),
    [
        ("timm", RESNET),
        ("timm", EFFICIENT),
        ("torchvision", EFFICIENT),
        ("transformers", BOTTLENECKS),
    ],
)
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "m.net.", "resnet.", "model.efficientnet."]
)
def test_one_common_prefix_is_stripped(tmp_path, library, model, prefix, caplog):
    variables = save_as(library, tmp_path, model)
    tensors = {f"{prefix}{name}": x for name, x in stored(tmp_path).items()}
    store(tmp_path, tensors | {"criterion.weight": np.zeros(3, np.float32)})
    with caplog.at_level("INFO"):
        found = find(tmp_path)
    assert f"'{prefix}' is stripped from its names" in caplog.text
    assert (found.prefix, found.num_classes) == (prefix, 3)
    classifier_weights.check_tensors(found, model)
    again, unused = classifier_weights.read(found, model)
    assert_equal(again, without_head(variables))
    head = f"{prefix}{found.naming.head}"
    assert unused == tuple(
        sorted([f"{head}.bias", f"{head}.weight", "criterion.weight"])
    )


def test_two_networks_in_a_file_are_refused(tmp_path):
    export(tmp_path, RESNET)
    tensors = stored(tmp_path)
    store(
        tmp_path,
        {f"{part}.{x}": tensors[x] for part in ("student", "teacher") for x in tensors},
    )
    with pytest.raises(UserError, match=r"several, .* with student\., teacher\."):
        find(tmp_path)


@pytest.mark.parametrize(
    ("library", "model", "head"),
    [
        ("timm", RESNET, "fc"),
        ("torchvision", EFFICIENT, "classifier"),
        ("transformers", RESNET, "classifier"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_replaced_head_is_left_over_however_deep(
    tmp_path, library, model, head, prefix
):
    variables = save_as(library, tmp_path, model)
    tensors = {
        f"{prefix}{name}": tensor
        for name, tensor in stored(tmp_path).items()
        if not name.startswith(f"{head}.")
    }
    zeros = np.zeros((3, 3), np.float32)
    names = ["0.weight", "1.running_mean", "3.block.0.weight", "3.block.0.bias"]
    names += ["1.weight"]  # not that of transformers' and torchvision's last layer
    names = sorted(f"{prefix}{head}.{name}" for name in names)
    store(tmp_path, tensors | dict.fromkeys(names, zeros))
    again, unused = read(tmp_path, model)
    assert_equal(again, without_head(variables))
    assert list(unused) == names and find(tmp_path).num_classes == 0


@pytest.mark.parametrize("name", ["mine", "resnetblur18.in1k", "my-ResNetAA50"])
def test_a_bare_file_is_said_to_be_taken_for_what(tmp_path, name, caplog):
    export(tmp_path, RESNET)
    (tmp_path / "config.json").unlink()
    path = (tmp_path / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    if name != "mine":  # the same tensors, and another network
        with pytest.raises(UserError, match="which has its tensors and computes other"):
            find(path)
        return
    with caplog.at_level("WARNING"):
        find(path)
    assert "has no config.json: it is taken for a ResNet of timm" in caplog.text
    assert "resnetaa and resnetblur have the same tensors" in caplog.text
