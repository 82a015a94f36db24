"""What `import mvc_jax` offers to programs, and the examples of its docstrings."""

import doctest
import inspect
import logging
import subprocess
import sys

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mvc_jax
from mvc_jax import augment, classifiers, data, mixing, pipeline
from mvc_jax.augment import policies
from mvc_jax.checkpoints import classifier_card, classifier_export
from mvc_jax.configs import common, digits
from mvc_jax.data import sources
from mvc_jax.errors import UserError
from mvc_jax.mixing import operations
from mvc_jax.training import console, runtime

PUBLIC = {  # a module -> what it promises
    mvc_jax: ["augment", "classifiers", "data", "mixing", "pipeline", "run"],
    augment: ["NAMES", "fields", "policy"],
    classifiers: ["NAMES", "Classifier", "create"],
    data: ["open_source"],
    mixing: ["coarse_mix", "fine_mix"],
    pipeline: ["InstructPix2Pix"],
}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_what_is_public_is_documented(module):
    assert module.__all__ == PUBLIC[module]
    for name in module.__all__:
        assert name in dir(module)
        found = getattr(module, name)
        assert name.isupper() or inspect.getdoc(found), name


def test_importing_is_cheap():
    program = (
        "import sys, mvc_jax, mvc_jax.mixing, mvc_jax.data, mvc_jax.augment;"
        "print(sorted({'jax', 'flax', 'transformers'} & {*sys.modules}));"
        "print(callable(mvc_jax.mixing.fine_mix))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=1)
    assert found.stdout.split("\n")[:2] == ["[]", "True"], found.stderr


@pytest.mark.parametrize(
    "module",
    [mvc_jax, operations, policies, sources, classifiers, pipeline],
    ids=lambda module: module.__name__,
)
def test_examples(module, request, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "set_up", lambda _: None)
    names = {"workdir": tmp_path / "run"}
    if module is pipeline:
        names["folder"] = request.getfixturevalue("original")
    options = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    result = doctest.testmod(module, extraglobs=names, optionflags=options)
    assert result.attempted > 3
    assert not result.failed


def test_a_program_without_logging_sees_progress_and_what_a_preset_sets(
    monkeypatch, capsys
):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    before = root.level, absl.logging.get_verbosity(), sys.excepthook
    with console.shown():
        console.Progress("images", 2).close()
        digits.get_config("preset=fast")
    shown = capsys.readouterr().err
    assert "images: 0/2 steps\n" in shown
    assert "preset fast: generate.guidance_interval=(0.2, 0.8), " in shown
    assert "override what a preset sets" in shown
    assert root.handlers == []
    assert (root.level, absl.logging.get_verbosity(), sys.excepthook) == before


# InstructPix2Pix: the same image as a run's is drawn in tests/test_pipeline.py.


@pytest.fixture(scope="module")
def tiny_pipeline(original):
    return pipeline.InstructPix2Pix.from_pretrained(original, batch_size=2)


def test_its_defaults_are_those_of_the_stage():
    parameters = inspect.signature(pipeline.InstructPix2Pix.sample).parameters
    section = common.get_config().generate
    names = {*parameters} & {*section}
    assert {"sampler", "steps", "text_scale", "timestep_spacing"} < names
    for name in names:
        assert parameters[name].default == section[name], name


def test_texts_are_mixed_as_by_hand(tiny_pipeline):
    prompts = ["a bold stroke", "a photo"]
    partners = [["a digit one"], ["a bold photo", "of one"]]
    recipes = [
        {"positions": [1, 2]},
        {"dims": [[3, 7]], "dim_donors": [1, 0], "dim_tokens": [2, 4]},
    ]
    plain = tiny_pipeline.encode_texts(prompts)
    others = [tiny_pipeline.encode_texts(texts) for texts in partners]
    mixed = tiny_pipeline.encode_texts(prompts, partners, recipes)
    expected = plain.copy()
    expected[0, [1, 2]] = others[0][0, [1, 2]]
    expected[1, 2:4, 3], expected[1, 2:4, 7] = (
        others[1][1, 2:4, 3],
        others[1][0, 2:4, 7],
    )
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    assert (mixed[0] != plain[0]).any()
    for fewer in ({"recipe": recipes}, {"partners": partners}, {"recipe": {}}):
        kept = {"partners": partners} | fewer if "recipe" in fewer else fewer
        if fewer != {"recipe": recipes}:
            same = tiny_pipeline.encode_texts(prompts, **kept)
            np.testing.assert_allclose(same, plain, atol=1e-6)


def test_an_image_depends_on_its_own_row(tiny_pipeline):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    prompts, options = ["a", "b", "c"], {"key": jax.random.key(1), "steps": 2}
    three = tiny_pipeline.sample(images, prompts, **options)
    seed = {"noise_seed": 2}
    last = tiny_pipeline.sample(images[2:], prompts[2:], recipe=seed, **options)
    np.testing.assert_allclose(last[0].astype(int), three[2], atol=1)
    assert (three[0] != three[1]).any()
    other = tiny_pipeline.sample(images[2:], prompts[2:], **options)
    assert (other != last).any()


def test_a_model_is_found_in_a_workdir_and_images_come_in_any_container(
    tiny_pipeline, original, tmp_path
):
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "model").symlink_to(original)
    found = pipeline.InstructPix2Pix.from_pretrained(tmp_path, batch_size=2)
    texts = [model.encode_texts(["a"]) for model in (found, tiny_pipeline)]
    np.testing.assert_array_equal(*texts)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    arrays = [Image.fromarray(image) for image in images], jnp.asarray(images)
    drawn = [
        tiny_pipeline.sample(x, ["a", "b"], key=key, steps=2)
        for x, key in zip(
            (images, *arrays),
            (jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(3)),
            strict=True,
        )
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_a_folder_and_options_that_are_wrong_are_named_as_arguments(tmp_path):
    load = pipeline.InstructPix2Pix.from_pretrained
    with pytest.raises(UserError, match="^folder '.*/none': wanted a folder in"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match="^dtype: wanted auto or float32 or bfloat16"):
        make = inspect.unwrap(pipeline.InstructPix2Pix.__init__)
        make(None, None, None, dtype="float16")


IMAGES = np.zeros((2, 8, 8, 3), np.uint8)
MIXED = {"partners": ["c", "d"]}


def reference_mix(recipe):
    return MIXED | {"recipe": recipe}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"images": IMAGES / 255},
            "images: wanted .*uint8 .*multiples of 4, got float64",
        ),
        ({"images": IMAGES[:, :7]}, r"got uint8 \[2, 7, 8, 3\]"),
        ({"prompts": "a cat"}, "prompts: wanted one for each of the 2 .* got a string"),
        ({"partners": ["one"]}, "partners: wanted one for each of the 2 images, got 1"),
        ({"recipe": [{}] * 3}, "recipe: wanted one for each of the 2 images, got 3"),
        ({"recipe": {"dims": [1]}}, "recipe: wanted partners, .*, got none"),
        ({"images": [IMAGES[0], IMAGES[0, :4]]}, r"got a list of sizes \(4, 8, 3\), "),
        ({"images": IMAGES[:0], "prompts": []}, "images: wanted one or more"),
        ({"prompts": ["a", 1]}, "prompts: wanted a text for each image, got 1"),
        ({"partners": ["a", []]}, r"partners: wanted a text .*, got \[\]"),
        ({"steps": 501, "timestep_spacing": "leading"}, "^steps: wanted"),
        ({"steps": 0}, "^steps: wanted a whole number from 1"),
        ({"sampler": "pndm"}, "^sampler: wanted ddim or"),
        ({"guidance_interval": 0.3}, "^guidance_interval: wanted 2 numbers"),
        ({"text_scale": [1.0]}, "^text_scale: wanted one for each of the 2 images"),
        ({"image_scale": -1.0}, "^image_scale: wanted a number"),
        ({"key": 0}, "^key: wanted one random key, got int32"),
        (reference_mix({"position": [1]}), "^recipe: .* no such field: position"),
        (reference_mix({"positions": [0]}), r"positions is \[0\], not within \[1, "),
        (reference_mix([{}, {"dims": [10**6]}]), r"^recipe\[1\]: .* dims is \["),
        (reference_mix({"dims": [1], "dim_donors": [1]}), "not indices of 1 partners"),
        (reference_mix(["coarse"] * 2), r"^recipe\[0\]: wanted a mapping"),
    ],
)
def test_arguments_that_do_not_match_are_refused(tiny_pipeline, changed, words):
    given = {"images": IMAGES, "prompts": ["a", "b"], "key": jax.random.key(0)}
    with pytest.raises(UserError, match=words):
        sample = inspect.unwrap(pipeline.InstructPix2Pix.sample)  # by beartype
        sample(tiny_pipeline, **given | changed)


# Mixing: values are tested in tests/test_mix.py.

STATES, PARTNERS = np.zeros((5, 4), np.float32), np.ones((2, 5, 4), np.float32)


def test_mixing_takes_arrays_of_any_kind():
    expected = STATES.copy()
    expected[[1, 3]] = 1
    for module in (np, jnp):
        states, partners = module.asarray(STATES), module.asarray(PARTNERS)
        mixed = mixing.coarse_mix(states, partners, [1, 3])
        np.testing.assert_array_equal(mixed, expected)
        assert isinstance(mixed, jax.Array)
    np.testing.assert_array_equal(mixing.coarse_mix(STATES, PARTNERS, []), STATES)
    fine = mixing.fine_mix(STATES, PARTNERS, dims=np.array([0, 2]), donors=[1, 0])
    rows = np.broadcast_to([0, 2], (5, 2))
    np.testing.assert_array_equal(fine, mixing.fine_mix(STATES, PARTNERS, rows))
    assert mixing.fine_mix(jnp.bfloat16(STATES), PARTNERS, [0]).dtype == jnp.bfloat16

    def total(states, partners):
        return mixing.coarse_mix(states, partners, [1, 3]).sum()

    of_states, of_partners = jax.grad(total, (0, 1))(STATES, PARTNERS)
    assert (of_states.sum(), of_partners.sum()) == (3 * 4, 2 * 4)


@pytest.mark.parametrize(
    ("function", "changed", "words"),
    [
        ("coarse_mix", {"states": STATES[None]}, "states: wanted .*jax.vmap"),
        ("coarse_mix", {"partners": PARTNERS[0]}, "partners: wanted .*partners.None."),
        ("coarse_mix", {"partners": PARTNERS[:, :4]}, r"got \[2, 4, 4\]"),
        ("coarse_mix", {"positions": [1.0]}, "positions: wanted whole numbers"),
        ("coarse_mix", {"donors": [0, 1]}, "donors: wanted 1 partners, .* got"),
        ("coarse_mix", {"donors": [2]}, r"from 0 to 1, got \[2\]"),
        ("fine_mix", {"dims": np.zeros((3, 1), int)}, "dims: wanted .*L=5 tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(function, changed, words):
    last = {"positions": [1]} if function == "coarse_mix" else {"dims": [1]}
    given = {"states": STATES, "partners": PARTNERS, **last} | changed
    unchecked = inspect.unwrap(getattr(operations, function))  # by beartype
    with pytest.raises(UserError, match=words):
        unchecked(**given)


def test_a_policy_takes_one_image_of_any_kind():
    policy, key = augment.policy("flip"), jax.random.key(0)
    assert policy(key, IMAGES[0]).shape == IMAGES[0].shape
    with pytest.raises(ValueError, match="image: one, .* not .2, 8, 8, 3.; .*vmap"):
        policy(key, IMAGES)


# Classifiers.


def test_a_classifier_that_was_written_predicts_the_same(tmp_path):
    made = classifiers.create("resnet8", num_classes=3, width=4)
    draw = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: x + draw.uniform(0, 0.1, x.shape).astype(np.float32), made.variables
    )
    done = classifier_card.Preprocessing(
        "stretch", "lanczos", 16, 16, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    )
    names = ("a", "b", "c")
    classifier_export.write(
        tmp_path,
        made.network,
        variables,
        variant="resnet8",
        class_names=names,
        preprocessing=done,
    )
    read = classifiers.create(pretrained=tmp_path)
    assert (read.class_names, read.size) == (names, 16)
    assert jax.tree.all(jax.tree.map(np.array_equal, read.variables, variables))
    images = draw.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    inputs = (images / 255.0 - np.float32(done.mean)) / np.float32(done.std)
    logits = made.network.apply(variables, jnp.asarray(inputs, jnp.float32))
    np.testing.assert_allclose(
        read.predict(images), jax.nn.softmax(logits, -1), atol=1e-5
    )
    other = classifiers.create(pretrained=tmp_path, num_classes=5)
    assert other.predict(images).shape == (2, 5)
    assert other.class_names == ()
    same, drawn = read.variables["params"], other.variables["params"]
    assert all(
        jax.tree.all(jax.tree.map(np.array_equal, same[name], drawn[name]))
        for name in same.keys() - {"fc"}
    )


def test_a_classifier_s_name_is_checked():
    with pytest.raises(UserError, match="name: wanted one of resnet8, .* got 'vgg'"):
        classifiers.create("vgg")
    wide = classifiers._ALIASES
    assert {*wide.values()} <= {*classifiers.NAMES}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": "resnet19"}, "got 'resnet19'. resnet18 is one"),
        ({"num_classes": 0}, "num_classes: wanted a whole number of at least 1"),
        ({"pretrained": True}, "pretrained: wanted .* got True. Pass e.g. 'timm/"),
        ({"dtype": "float16"}, "dtype: wanted auto or"),
        ({"depth": 3}, "^depth: wanted nothing: resnet8 has no depth"),
    ],
)
def test_a_classifier_s_arguments_are_checked(changed, words):
    create = inspect.unwrap(classifiers.create)
    with pytest.raises(UserError, match=words):
        create(**{"name": "resnet8"} | changed)


def test_a_classifier_s_images_are_checked():
    for images in (IMAGES[0], IMAGES / 255, IMAGES[..., :1]):
        with pytest.raises(UserError, match="images: wanted uint8 .B, H, W, 3., got"):
            inspect.unwrap(classifiers.Classifier.predict)(None, images)
