"""Classifier checkpoints: three libraries' names in and out, and what is refused."""

import functools
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from test_classifier_parity import images, random_variables

from mvc_jax.checkpoints import (
    classifier_checkpoint,
    classifier_export,
    classifier_names,
    classifier_weights,
)
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
OPTIONS = {"xla_backend_optimization_level": 0}


def export(folder, model, library="timm", variant=None, variables=None):
    variant = variant or ("efficientnet_b0" if "Eff" in repr(model) else "resnet18")
    variables = random_variables(model) if variables is None else variables
    classifier_export.write(
        folder,
        model,
        variables,
        variant=variant,
        library=library,
        class_names=CLASSES,
        mean=MEAN,
        std=STD,
        size=36,
    )
    return variables


def find(path):
    return classifier_checkpoint.find(str(path), field="config.classify.pretrained")


def read(path, model, **options):
    return classifier_weights.read(find(path), model, **options)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("library", classifier_names.LIBRARIES)
@pytest.mark.parametrize("model", [RESNET, BOTTLENECKS, EFFICIENT, TENSORFLOW])
def test_a_round_trip_is_exact(tmp_path, model, library):
    lacking = {("transformers", EFFICIENT), ("torchvision", TENSORFLOW)}
    if (library, model) in lacking:
        with pytest.raises(UserError, match=f"a network that {library} has"):
            export(tmp_path, model, library)
        return
    variables = export(tmp_path, model, library)
    found = find(tmp_path)
    assert found.num_classes == 3 and found.size == 36
    np.testing.assert_allclose([found.mean, found.std], [MEAN, STD], rtol=1e-12)
    fields = {key: getattr(model, key) for key in found.fields}
    assert fields == found.fields
    assert ("padding" in fields) == (model is TENSORFLOW)
    again, left = classifier_weights.read(found, model, head="keep")
    assert_equal(again, variables)
    assert left == ()


@pytest.mark.parametrize(
    ("model", "kind"),
    [(RESNET, "ResNet"), (BOTTLENECKS, "ResNet"), (TENSORFLOW, "EfficientNet")],
    ids=["basic", "bottleneck", "efficientnet"],
)
def test_transformers_loads_what_we_write_and_computes_the_same(
    torch, tmp_path, model, kind
):
    import transformers

    variables = export(tmp_path, model, "transformers")
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
    assert network.config.id2label == dict(enumerate(CLASSES))
    processor = transformers.AutoImageProcessor.from_pretrained(
        tmp_path, use_fast=False
    )
    pixels = np.full((36, 36, 3), 51, np.uint8)
    normalised = processor(pixels, return_tensors="np")["pixel_values"][0, :, 0, 0]
    wanted = (0.2 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(normalised, wanted, rtol=1e-5)


# Of the libraries' own state dictionaries: tensors in all, and some of them.
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
    classifier_export.write(
        tmp_path,
        model,
        zeros,
        variant=variant,
        library=library,
        class_names=[str(index) for index in range(1000)],
        mean=MEAN,
        std=STD,
        size=224,
    )
    header = find(tmp_path)
    assert (header.variant, header.num_classes) == (variant, 1000)
    with (tmp_path / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        stored = json.loads(file.read(length))
    del stored["__metadata__"]
    assert len(stored) == count
    for name, shape in some.items():
        assert tuple(stored[name]["shape"]) == shape, name
        kind = "I64" if name.endswith("num_batches_tracked") else "F32"
        assert stored[name]["dtype"] == kind


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


def test_transformers_pads_odd_images_of_an_efficientnet_otherwise(tmp_path):
    with pytest.raises(UserError, match="an even size"):
        classifier_export.write(
            tmp_path,
            TENSORFLOW,
            {},
            variant="efficientnet_b0",
            library="transformers",
            class_names=CLASSES,
            mean=MEAN,
            std=STD,
            size=33,
        )


def test_a_network_that_timm_does_not_have(tmp_path):
    model = WideResNet(3, depth=10, widen=2)
    variables = export(tmp_path, model, variant="wrn16_4")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "mvc_jax_wrn16_4"
    found = find(tmp_path)
    assert (found.variant, found.fields) == ("wrn16_4", {"depth": 10, "widen": 2})
    again, left = classifier_weights.read(found, model, head="keep")
    assert_equal(again, variables)
    assert left == ()
    with pytest.raises(UserError, match="looks like mvc_jax_wrn16_4"):
        classifier_weights.read(found, RESNET)


def test_the_cifar_stem_is_no_network_of_the_libraries(tmp_path):
    model = ResNet(3, depths=(1, 2), width=8, stem="cifar")
    export(tmp_path, model)
    found = find(tmp_path)
    assert found.fields["stem"] == "cifar"
    with pytest.raises(UserError, match="a network that transformers has"):
        export(tmp_path / "other", model, "transformers")
    with pytest.raises(UserError, match=r"conv1.weight makes \[3, 3, 3, 8\]"):
        classifier_weights.read(found, RESNET)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_new_head(tmp_path, library):
    old = export(tmp_path, RESNET, library)
    model = RESNET.clone(num_classes=7)
    fresh, left = read(tmp_path, model, head="fresh", key=jax.random.key(0))
    zero, _ = read(tmp_path, model)
    head = {"timm": "fc", "transformers": "classifier.1"}[library]
    assert left == (f"{head}.bias", f"{head}.weight")
    assert fresh["params"]["fc"]["kernel"].std() > 0.05
    for new in (fresh, zero):
        assert new["params"]["fc"]["kernel"].shape == (64 // 4, 7)
        assert not new["params"]["fc"]["bias"].any()
        for tree in (old, new):
            tree["params"].pop("fc", None)
        assert_equal(new, old)
    with pytest.raises(UserError, match="wanted a head of 7 classes, got 3"):
        read(tmp_path, model, head="keep")


def stored(path):
    return safetensors.numpy.load_file(path / "model.safetensors")


def store(path, tensors):
    safetensors.numpy.save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_a_transformers_checkpoint_without_a_head(tmp_path):
    variables = export(tmp_path, TENSORFLOW, "transformers")
    tensors = {
        name.removeprefix("efficientnet."): tensor
        for name, tensor in stored(tmp_path).items()
        if not name.startswith("classifier")
    }
    store(tmp_path, tensors)
    assert find(tmp_path).num_classes == 0
    again, left = read(tmp_path, TENSORFLOW)
    assert left == ()
    assert_equal(again["batch_stats"], variables["batch_stats"])
    with pytest.raises(UserError, match="a head of 3 classes, got none"):
        read(tmp_path, TENSORFLOW, head="keep")


def test_half_precision_is_read_as_float32(tmp_path):
    variables = export(tmp_path, RESNET)
    halved = {
        name: tensor.astype(np.float16) if tensor.dtype == np.float32 else tensor
        for name, tensor in stored(tmp_path).items()
    }
    store(tmp_path, halved)
    again, _ = read(tmp_path, RESNET, head="keep")
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {np.dtype(np.float32)}
    close = functools.partial(np.testing.assert_allclose, atol=2e-3)
    jax.tree.map(close, again, variables)


def test_strangers_are_left_and_listed(tmp_path):
    export(tmp_path, RESNET)
    store(tmp_path, stored(tmp_path) | {"aux.0.weight": np.zeros(3, np.float32)})
    _, left = read(tmp_path, RESNET)
    assert left == ("aux.0.weight", "fc.bias", "fc.weight")


def test_what_has_no_place_inside_the_network_is_an_error(tmp_path):
    export(tmp_path, RESNET)
    name = "layer1.0.se.fc1.weight"
    store(tmp_path, stored(tmp_path) | {name: np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=f"{name} is unexpected"):
        read(tmp_path, RESNET)


def test_what_is_missing_or_of_another_shape_is_listed(tmp_path):
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
    ],
    ids=["deeper", "wider", "bottlenecks", "efficientnet"],
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


def test_configs_of_what_ours_cannot_be(tmp_path):
    export(tmp_path / "a", RESNET, "transformers")
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
    with pytest.raises(UserError, match="an architecture of ours: resnet8, .* 'nope'"):
        find(tmp_path / "b")


def test_an_architecture_with_the_tensors_of_another(tmp_path):
    model = VARIANTS["resnet18"].make(num_classes=3)
    zeros = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape),
        classifier_weights.variable_shapes(model),
    )
    export(tmp_path, model, variables=zeros)
    set_config(tmp_path, architecture="resnetblur18")
    with pytest.raises(UserError, match="the architecture resnet18, .* 'resnetblur18'"):
        find(tmp_path)


def test_a_single_file_of_torchvision_has_imagenet_s_normalisation(tmp_path):
    export(tmp_path, EFFICIENT, "torchvision")
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

    export(tmp_path, TENSORFLOW, "transformers")
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
    asked = []

    def download(name, patterns, *, field, revision):
        asked.append((name, tuple(patterns), field, revision))
        return epath.Path(tmp_path)

    monkeypatch.setattr(classifier_checkpoint.hub, "download", download)
    found = classifier_checkpoint.find("timm/resnet18.a1_in1k", field="f", revision="r")
    assert found.num_classes == 3
    ((name, patterns, field, revision),) = asked
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
