"""Prompts: the caption may be cut, the label never; the caption file comes back."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.data import captions
from mvc_jax.errors import UserError

SUFFIX = "a photo of digit three"


def count_tokens(text):
    """Words and punctuation marks are a token each; two markers."""
    return 2 + len(re.findall(r"\w+|[^\w\s]", text))


word = st.from_regex(r"[a-zé]{1,6}[,.;]?", fullmatch=True)


@given(st.lists(word, max_size=30).map(" ".join), st.integers(7, 30))
@settings(deadline=None, max_examples=200)
def test_the_caption_is_cut_to_its_longest_prefix_that_fits(caption, max_tokens):
    options = {"count_tokens": count_tokens, "max_tokens": max_tokens}
    text = captions.prompt(caption, SUFFIX, **options)
    assert count_tokens(text) <= max_tokens

    words = caption.split()
    prefixes = [" ".join(words[:n]).rstrip(",.;") for n in range(len(words) + 1)]
    texts = [f"{prefix}, {SUFFIX}" if prefix else SUFFIX for prefix in prefixes]
    assert text == [t for t in texts if count_tokens(t) <= max_tokens][-1]


@pytest.mark.parametrize("caption", ["", "  \n", ",", ". ; ,"])
def test_a_caption_without_words_leaves_the_class_prompt(caption):
    options = {"count_tokens": count_tokens, "max_tokens": 77}
    assert captions.prompt(caption, SUFFIX, **options) == SUFFIX


@pytest.mark.parametrize("caption", ["", "a bold stroke"])
def test_a_class_prompt_that_is_too_long_is_an_error(caption):
    with pytest.raises(UserError, match="class_type") as error:
        captions.prompt(caption, SUFFIX, count_tokens=count_tokens, max_tokens=6)
    for word in (SUFFIX, "at most 6 tokens", "got 7"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("class_type", "name", "expected"),
    [
        ("digit", "three", "a photo of digit three"),
        ("brain scan", "no_tumor", "a photo of brain scan no tumor"),
        ("", "_naïve__class ", "a photo of naïve class"),
    ],
)
def test_class_names_are_written_as_one_would(class_type, name, expected):
    assert captions.class_prompt(class_type, name) == expected


@given(st.dictionaries(st.text(), st.text(), max_size=6))
@settings(deadline=None, max_examples=100)
def test_captions_come_back_in_the_order_asked(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    captions.write_captions(path, texts, captioner="c", version="1")
    asked = list(texts)[::-1]
    assert captions.read_captions(path, asked) == [texts[id_] for id_ in asked]


def test_missing_captions_are_counted_and_named(tmp_path):
    path = tmp_path / "captions.jsonl"
    captions.write_captions(path, {"a": "x"}, captioner="c", version="1")
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        captions.read_captions(path, ["a", "b", "c", "d", "e"])
    for word in ("each of 5 images", "none for 4", "b, c, d"):
        assert word in str(error.value)
