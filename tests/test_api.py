"""What `import mvc_jax` offers to programs, and the examples of its docstrings."""

import doctest
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mvc_jax
from mvc_jax import augment, classifiers, data, mixing, pipeline
from mvc_jax.augment import policies
from mvc_jax.checkpoints import classifier_card, classifier_export
from mvc_jax.configs import common
from mvc_jax.data import sources
from mvc_jax.errors import UserError
from mvc_jax.mixing import operations
from mvc_jax.training import runtime

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


IMAGES = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"images": IMAGES / 255},
            "images: wanted uint8 .*multiples of 4, got float64",
        ),
        ({"images": IMAGES[:, :7]}, r"got uint8 \[2, 7, 8, 3\]"),
        ({"prompts": "a cat"}, "prompts: wanted one for each of the 2 .* got a string"),
        ({"partners": ["one"]}, "partners: wanted one for each of the 2 images, got 1"),
        ({"recipe": [{}] * 3}, "recipe: wanted one for each of the 2 images, got 3"),
        ({"recipe": {"dims": [1]}}, "recipe: wanted partners, .*, got none"),
        ({"steps": 501, "timestep_spacing": "leading"}, "generate.steps: wanted"),
    ],
)
def test_arguments_that_do_not_match_are_refused(tiny_pipeline, changed, words):
    given = {"images": IMAGES, "prompts": ["a", "b"], "key": jax.random.key(0)}
    with pytest.raises(UserError, match=words):
        tiny_pipeline.sample(**given | changed)


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
