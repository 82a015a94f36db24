"""Sentences of what limits the results, by the files of a workdir."""

import pytest
from etils import epath

from mvc_jax import files
from mvc_jax.classification import runs
from mvc_jax.metrics import caveats


def described(
    folder,
    *,
    duplicates=(),
    policy="keep",
    bad=0,
    prompts=None,
    seeds=3,
    names=("real", "combined"),
):
    """What is said of a workdir with these files."""
    caption = epath.Path(folder) / "caption"
    caption.mkdir()
    files.write_json(caption / "dataset.json", {"duplicates": policy})
    files.write_jsonl(caption / "duplicates.jsonl", [*duplicates])
    files.write_jsonl(caption / "bad_images.jsonl", [{}] * bad)
    if prompts is not None:
        (caption.parent / "encode").mkdir()
        files.write_jsonl(caption.parent / "encode" / "prompts.jsonl", prompts)
    once = runs.drawn_once(map(runs.parse, names))
    return caveats.describe(caption.parent, seeds, once)


@pytest.mark.parametrize(
    ("copies", "policy", "bad", "words"),
    [
        (0, "keep", 0, []),
        (2, "keep", 0, ["2 training images are in test as well"]),
        (2, "remove", 3, ["2 images that are also in test", "3 images could not be"]),
    ],
)
def test_duplicates_and_bad_images_are_noted(tmp_path, copies, policy, bad, words):
    found = described(tmp_path, duplicates=[{}] * copies, policy=policy, bad=bad)
    kinds = found["caveats"]
    *of_test, _ = kinds["accuracy"]
    assert found["notes"] == [*kinds["data"], *kinds["accuracy"], *kinds["copies"]]
    assert bool(of_test) == (copies > 0 and policy == "keep")
    for word, note in zip(words, [*of_test, *kinds["data"]], strict=True):
        assert word in note


def test_copies_in_the_pool_are_noted_apart(tmp_path):
    rows = [{"train": "a", "test": "b"}, {"pool": "c", "test": "b"}]
    in_train, in_pool, _ = described(tmp_path, duplicates=rows)["caveats"]["accuracy"]
    assert in_train.startswith("1 training images are in test as well")
    assert in_pool.startswith("1 images of the base model's pool are in test as well")


def test_captions_that_were_cut_are_counted(tmp_path):
    rows = [{"class_name": "cat", "caption_kept": "part"}, {"class_name": "dog"}]
    data = described(tmp_path, prompts=rows)["caveats"]["data"]
    assert data == ["1 captions were cut (cat 1)."]


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        (3, "over 3 classifier seeds, an interval over seeds and test images; both"),
        (1, "With one classifier seed there is no spread; the result is of one split"),
    ],
)
def test_the_spread_says_what_it_is_of(tmp_path, seeds, words):
    [spread] = described(tmp_path, seeds=seeds)["caveats"]["accuracy"]
    assert words in spread and "of one split and one generator." in spread


@pytest.mark.parametrize("names", [("real",), ("real+flip", "probabilistic:real")])
def test_real_images_alone_are_of_no_generator(tmp_path, names):
    [spread] = described(tmp_path, names=names)["caveats"]["accuracy"]
    assert "both are of one split. Another split" in spread
