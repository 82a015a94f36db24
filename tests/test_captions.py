"""Prompts: the caption may be truncated, the label never; caption files round-trip."""

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax.data import captions
from mvc_jax.errors import UserError

THREE = {"class_type": "digit", "class_name": "three"}
ALONE = "a photo of digit three"


def count_tokens(text):
    """Words and punctuation marks are one token each, plus BOS and EOS."""
    return 2 + len(re.findall(r"\w+|[^\w\s]", text))


def prompt(caption, max_tokens=77, template=captions.PROMPT, **names):
    options = {"count_tokens": count_tokens, "max_tokens": max_tokens}
    return captions.prompt(template, caption, **(names or THREE), **options)


word = st.sampled_from([a + b for a in ("a", "red", "étude") for b in ("", *",.;")])


@given(st.lists(word, max_size=30).map(" ".join), st.integers(7, 30))
@settings(deadline=None, max_examples=200)
def test_the_caption_is_truncated_to_its_longest_prefix_that_fits(caption, max_tokens):
    text = prompt(caption, max_tokens).text
    assert count_tokens(text) <= max_tokens

    words = caption.split()
    prefixes = [" ".join(words[:n]).rstrip(",.;") for n in range(len(words) + 1)]
    texts = [f"{prefix}, {ALONE}" if prefix else ALONE for prefix in prefixes]
    assert text == [t for t in texts if count_tokens(t) <= max_tokens][-1]


TAGS = ",".join(f"tag{letter}" for letter in "abcdefghijklmnopqrst")


@pytest.mark.parametrize(
    ("caption", "max_tokens", "expected"),
    [
        (TAGS, 19, "taga,tagb,tagc,tagd,tage,tagf"),
        ("two tags," + TAGS, 19, "two tags,taga,tagb,tagc,tagd"),
        ("一" * 30, 19, "一" * 11),
        ("红色圆形、蓝色方形。绿色三角形", 16, "红色圆形、蓝色方"),
        ("สวัสดีครับ", 12, "สวัส"),
        ("สวัสดีครับ", 10, "ส"),  # not between a consonant and its vowel sign
        ("5" * 40 + " five", 19, "5" * 11),
        ("a " + "5" * 40, 19, "a " + "5" * 10),
        ("x " + "👨\u200d👩\u200d👧" * 3, 12, "x"),  # three persons are one picture
        ("👍🏽" * 9, 13, "👍🏽" * 2),  # a hand and its colour, too
        ("🇩🇪" * 9, 13, "🇩🇪" * 2),  # and two letters of a flag
        (";; 、a.b", 12, ";; 、a"),  # some of the first word, rather than no word
    ],
)
def test_a_text_without_spaces_is_cut_too(caption, max_tokens, expected):
    """Where a word has no end that fits, it is cut inside, else not at all."""

    def count(text):  # a token per letter of some scripts, as CLIP has none for them
        words = re.findall(r"[a-zA-Zé]+|[^\sa-zA-Zé]", text)
        return 2 + len(words)

    options = {"count_tokens": count, "max_tokens": max_tokens, **THREE}
    found = captions.prompt(captions.PROMPT, caption, **options)
    assert found.caption == expected and found.kept == "part"
    assert found.text == f"{expected}, {ALONE}" and count(found.text) <= max_tokens


def test_what_is_kept_of_a_caption():
    assert (
        prompt("a bold stroke.").kept == prompt("").kept == prompt(" , ").kept == "all"
    )
    assert prompt("a bold stroke", 9).kept == "part"
    assert prompt("a bold stroke", 7).kept == "none"
    assert prompt("a bold stroke", 7, "a {label}").kept == "all"  # there is no place
    rows = [{"class_name": name, "caption_kept": "part"} for name in "aabcdefg"]
    rows += [{"class_name": "b", "caption_kept": "none"}, {"class_name": "b"}]
    cut = captions.cut_by_class(rows)
    assert captions.counted(cut, "none") == "1 captions were lost (b 1)"
    assert captions.counted(cut, "part") == (
        "8 captions were cut (a 2, b 1, c 1, d 1, e 1 and 2 more classes)"
    )


@pytest.mark.parametrize("caption", ["", "  \n", ",", ". ; ,"])
def test_a_caption_without_words_leaves_the_class_prompt(caption):
    assert prompt(caption).text == ALONE


@pytest.mark.parametrize("caption", ["", "a bold stroke"])
def test_a_class_prompt_that_is_too_long_is_an_error(caption):
    with pytest.raises(UserError, match="class_type") as error:
        prompt(caption, 6)
    for word in (ALONE, "at most 6 tokens", "got 7"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("class_type", "name", "expected"),
    [
        ("digit", "three", "a photo of digit three"),
        ("brain scan", "no_tumor", "a photo of brain scan no tumor"),
        ("", "_naïve__class ", "a photo of naïve class"),
        ("", "../a/{b}", "a photo of ../a/{b}"),
    ],
)
def test_class_names_become_words(class_type, name, expected):
    assert prompt("", class_type=class_type, class_name=name).text == expected


@pytest.mark.parametrize(
    ("template", "with_caption", "without"),
    [
        ("{caption}, a photo of {label}", "a {red} x, a photo of three", None),
        ("a photo of {label}, {caption}", "a photo of three, a {red} x", None),
        ("{label}: {caption}.", "three: a {red} x.", "three."),
        ("a {class_type} {label}", "a digit three", "a digit three"),
    ],
)
def test_templates(template, with_caption, without):
    made = captions.fill(template, "a {red} x", **THREE)
    assert made.text == with_caption
    if made.caption:
        assert made.text.startswith(made.before + made.caption)
    alone = captions.fill(template, "", **THREE)
    assert alone.text == (without or "a photo of three")
    assert alone.caption == ""


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{caption}",
        "{label} {nope}",
        "{label} {label}",
        "{label",
        "{label} }",
        "{}",
        "{label} {}",
        "{label} {0}",
        "{label:d}",
        "{label} {class_type:>9}",
        "{label!r}",
        "{label.x}",
        "{label[0]}",
        "{ label }",
        "{{label}}",
        "{label} {{caption}}",
        "{caption:.40}, a photo of {label}",
        "{caption!s}, a photo of {label}",
        "{caption.upper}, a photo of {label}",
    ],
)
def test_a_template_has_the_label_and_known_fields_written_plainly(template):
    """What `fill` could not fill in is refused before any image is captioned."""
    fields = ("caption", "class_type", "label")
    with pytest.raises(UserError, match="config.data.prompt: wanted a text with") as e:
        captions.check_template(template, "config.data.prompt", fields)
    proposed = re.search("e.g. '(.*)'", str(e.value))[1]
    for known in (fields, fields[1:]):
        captions.check_template(proposed, "config.caption.template", known)


@given(
    st.lists(
        st.sampled_from(["{label}", "{caption}", "{class_type}", "a ", "{", "}", ":d"]),
        max_size=6,
    ).map("".join)
)
@settings(deadline=None, max_examples=200)
def test_every_template_that_passes_the_check_can_be_filled_in(template):
    try:
        captions.check_template(template, "x", ("caption", "class_type", "label"))
    except UserError:
        return
    for caption in ("", "a {red} x"):
        text = captions.fill(template, caption, **THREE).text
        assert "three" in text and "{label" not in text


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a\tcat\n on  a mat ", "a cat on a mat"),
        ("a cat a cat a cat on a mat", "a cat on a mat"),
        ("a brain, a brain, and a brain", "a brain"),
        ("a scan of a brain mri of a brain mri of a brain", "a scan of a brain mri"),
        ("a dog and a cat", "a dog and a cat"),
        ("a\x00b \u200b", "a b"),
        ("خانه\u200cها", "خانه\u200cها"),  # one word of Persian
        ("a 👨\u200d👩\u200d👧", "a 👨\u200d👩\u200d👧"),  # one picture
        ("\ufeffco\u00adop \u200d", "coop"),
        ("a\u061cb\u2028c\uffffd", "ab c d"),
        ("a pink heart \U0001fa77", "a pink heart \U0001fa77"),  # of Unicode 15
        ("", ""),
    ],
)
def test_captions_are_cleaned(raw, cleaned):
    assert captions.clean(raw).startswith(cleaned)
    assert captions.clean(captions.clean(raw)) == captions.clean(raw)


def test_a_person_s_caption_keeps_its_repetitions():
    assert captions.clean(" very  very good", collapse=False) == "very very good"


@given(st.lists(st.sampled_from(["a", "b", "and", "c,"]), max_size=12))
@settings(deadline=None, max_examples=200)
def test_cleaning_terminates_and_adds_no_word(words):
    cleaned = captions.clean(" ".join(words)).split()
    assert len(cleaned) <= len(words)
    assert {w.strip(",") for w in cleaned} == {w.strip(",") for w in words} or (
        "and" in words
    )
    assert all(a.strip(",") != b.strip(",") for a, b in itertools.pairwise(cleaned))


@given(st.dictionaries(st.text(), st.text(), max_size=6))
@settings(deadline=None, max_examples=100)
def test_captions_are_read_in_the_requested_order(tmp_path_factory, texts):
    path = tmp_path_factory.getbasetemp() / "captions.jsonl"
    captions.write_captions(path, texts, captioner="c", version="1")
    ids = list(texts)[::-1]
    assert captions.read_captions(path, ids) == [texts[id_] for id_ in ids]


def test_missing_captions_are_counted_and_named(tmp_path):
    path = tmp_path / "captions.jsonl"
    captions.write_captions(path, {"a": "x"}, captioner="c", version="1")
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        captions.read_captions(path, ["a", "b", "c", "d", "e"])
    for word in ("each of 5 images", "none for 4", "b, c, d"):
        assert word in str(error.value)


def test_a_caption_file_that_a_user_edited(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"id": "a", "caption": "x", "mine": 3}, {"id": "b", "caption": None}]
    lines = [json.dumps(row) for row in [*rows, {"id": "other", "caption": "z"}]]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    assert captions.read_user_captions(path, ["b", "a"], {"a", "b", "other"}) == [
        "",
        "x",
    ]
    with pytest.raises(UserError, match="1 unknown ids, e.g. other"):
        captions.read_user_captions(path, ["a"], {"a", "b"})
    with pytest.raises(UserError, match="none for 1, e.g. c"):
        captions.read_user_captions(path, ["a", "c"], {"a", "b", "c", "other"})
    with pytest.raises(UserError, match="config.caption.file.*no such file"):
        captions.read_user_captions(tmp_path / "none.jsonl", ["a"], {"a"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"id": "a", "caption": "x"}\nnope', "line 2.*JSONDecodeError"),
        ('{"id": "a"}', "line 1.*caption"),
        ('{"id": 3, "caption": "x"}', "line 1.*strings"),
        ('["a", "x"]', "line 1"),
        ('{"id": "a", "caption": "x"}\n{"id": "a", "caption": "y"}', "line 2.*second"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, content, words):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        captions.read_user_captions(path, ["a"], {"a"})
