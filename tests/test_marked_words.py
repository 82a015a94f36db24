"""Token positions of recipes as ranges of characters, and in words."""

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from recipe_rows import BY_ID, ROWS, SHAPE, D, L, draw
from texts import TEXTS

from mvc_jax import encode, files
from mvc_jax.mixing import marked_words, recipes
from mvc_jax.mixing.marked_words import TokenizedPrompt

WORDS = st.lists(
    st.sampled_from(
        ["A", "bold", "strokes,", "it's", "42", "naïve", "cafe\u0301", "数"]
    )
).map(" ".join)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny[0]


@given(text=WORDS | st.text(max_size=12) | st.sampled_from(TEXTS), data=st.data())
def test_pieces_of_a_prompt_are_the_tokens_that_they_name(model, text, data):
    (offsets,) = model.token_offsets([text])
    ids = model.tokenizer(text, max_length=model.context_length, truncation=True)
    ids = ids["input_ids"][1:-1]
    assert len(offsets) == len(ids)
    assert all(0 <= start < stop <= len(text) for start, stop in offsets)
    assert offsets == sorted(offsets)
    # Where a word ends, and with it a character: in between, a piece is no such token.
    names = model.tokenizer.convert_ids_to_tokens(ids)
    stops = [stop for _, stop in offsets]
    starts = [*(start for start, _ in offsets[1:]), len(text)]
    special = {*model.tokenizer.all_special_tokens}
    ends = [
        n
        for n, name in enumerate(names, start=1)
        if (name.endswith("</w>") or name in special) and stops[n - 1] <= starts[n - 1]
    ]
    if not ends:
        return
    first, last = sorted(data.draw(st.sampled_from([0, *ends])) for _ in range(2))
    run = range(first + 1, last + 1)
    (piece,) = TokenizedPrompt(text, offsets).ranges(run) or [(0, 0)]
    found = model.tokenizer(text[slice(*piece)])["input_ids"][1:-1]
    assert found == ids[first:last]


@given(st.data())
def test_ranges_are_apart_and_have_the_characters_of_their_tokens(data):
    text = "a bold stroke, a photo of digit one"
    offsets = [(0, 1), (2, 6), (7, 11), (11, 13), (13, 14), (15, 16), (17, 22)]
    positions = data.draw(st.sets(st.integers(0, 12)))
    found = TokenizedPrompt(text, offsets).ranges(positions)
    named = {i for p in positions if 1 <= p <= 7 for i in range(*offsets[p - 1])}
    marked = {i for start, stop in found for i in range(start, stop)}
    assert named == {i for i in marked if text[i] != " "}
    for (_, stop), (start, _) in zip(found, found[1:], strict=False):
        assert text[stop:start].strip()


def tokenized(row):
    """Its prompt: each token is a letter, and spaces are between."""
    count = row["tokens"] - 2
    text = " ".join("abcdefghijklmnop"[:count])
    return TokenizedPrompt(text, [(2 * n, 2 * n + 1) for n in range(count)])


PROMPTS = {id_: tokenized(row) for id_, row in BY_ID.items()}


@given(
    st.integers(0, 40),
    st.sampled_from(recipes.POSITIONS),
    st.integers(1, 3),
    st.booleans(),
)
def test_marked_are_the_tokens_of_the_recipe(k, positions, partners, class_prompt):
    drawing = recipes.Drawing(
        modes=("coarse", "fine", "both"),
        positions=positions,
        partners=partners,
        class_prompt=class_prompt,
        dims=3,
        dims_on="words",
    )
    recipe = draw(k, drawing)
    found = marked_words.provenance(recipe, PROMPTS, **SHAPE)
    assert (found["source"], found["seed"]) == (recipe["source"], recipe["noise_seed"])
    assert found["partners"] == recipe["partners"]
    dims = {*range(*recipe["dim_tokens"])} if recipe["dims"] else set()
    own = {*recipe["positions"]} | dims
    by_donor = [
        {
            p
            for p, m in zip(recipe["positions"], recipe["donors"], strict=True)
            if m == n
        }
        | (dims if n in recipe["dim_donors"] else set())
        for n in range(len(recipe["partners"]))
    ]
    ids = [recipe["source"], *recipe["partners"]]
    for id_, words, tokens in zip(ids, found["words"], [own, *by_donor], strict=True):
        text, count = PROMPTS[id_].text, BY_ID[id_]["tokens"] - 2
        assert words["caption"] == text
        marked = {
            n
            for a, b in words["marked"]
            for n, c in enumerate(text[a:b], a)
            if c != " "
        }
        assert marked == {2 * (p - 1) for p in tokens if p <= count}


def recipe_of(source="i1", partners=("i5",), **fields):
    return {
        "source": source,
        "partners": [*partners],
        "mode": "coarse",
        **recipes.NO_MIXING,
        "dim_tokens": [1, 1],
        "noise_seed": 3,
    } | fields


CASES = {  # i1 has 10 tokens after BOS, i5 has 9
    "words": (
        {"positions": [1, 2], "donors": [0, 0]},
        ["Replaced: 2 tokens of words, by 2 tokens of words of i5."],
    ),
    "the end and padding": (
        {"positions": [9, 10, 11, 12, 13], "donors": [0] * 5},
        [
            "Replaced: 2 tokens of words, EOS, 2 tokens of padding, by 1 token of "
            "words, EOS, 3 tokens of padding of i5."
        ],
    ),
    "dims of all tokens": (
        {
            "mode": "fine",
            "dims": [[1, 2, 3]],
            "dim_donors": [0, 0, 0],
            "dim_tokens": [1, L],
        },
        [f"Replaced: 3 of {D} dims of every token but BOS, by those of i5."],
    ),
    "dims of words, others for each": (
        {
            "mode": "fine",
            "dims": [[1], [4]],
            "dim_donors": [0],
            "dim_tokens": [2, 4],
        },
        [
            f"Replaced: 1 of {D} dims, others for each token, of tokens 2 to 3, by "
            "those of i5."
        ],
    ),
    "two partners": (
        {"partners": ["i5", "i7"], "positions": [1, 2, 3], "donors": [1, 0, 1]},
        [
            "Replaced: 1 token of words, by 1 token of words of i5.",
            "Replaced: 2 tokens of words, by 2 tokens of words of i7.",
        ],
    ),
    "nothing": ({}, ["Nothing is mixed."]),
    "with itself": (
        {"partners": ["i1"], "positions": [1], "donors": [0]},
        ["Nothing changes: its class has no other image to mix with."],
    ),
    "another set": ({"mode": "unmixed", "partners": []}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_marked_is_said(case):
    fields, expected = CASES[case]
    found = marked_words.provenance(recipe_of(**fields), PROMPTS, **SHAPE)
    assert found["mixed"] == expected


def test_in_an_older_run_captions_are_shown_without_marks(tmp_path):
    folder = epath.Path(tmp_path)
    files.write_jsonl(folder / "prompts.jsonl", ROWS)
    prompts = marked_words.read_prompts(folder, {"i1", "i5"})
    recipe = recipe_of(positions=[1, 2], donors=[0, 0])
    found = marked_words.provenance(recipe, prompts, **SHAPE)
    assert found["words"] == [
        {"caption": "p1", "marked": []},
        {"caption": "p5", "marked": []},
    ]
    assert found["mixed"] == ["Replaced: 2 tokens, by 2 tokens of i5."]
    assert marked_words.provenance(recipe, {}, **SHAPE)["words"] == []


def test_offsets_are_read_of_the_prompts_asked_for(tmp_path, model, monkeypatch):
    monkeypatch.setattr(encode, "_TOKENIZED", 2)
    texts = ["", "a bold stroke", "a photo", "one"]
    folder = epath.Path(tmp_path)
    rows = [{"id": f"i{n}", "prompt": text, "state": n} for n, text in enumerate(texts)]
    files.write_jsonl(folder / "prompts.jsonl", rows[1:])
    encode.write_offsets(folder / marked_words.OFFSETS, model, texts)
    found = marked_words.read_prompts(folder, {"i1", "i3"})
    assert [*found] == ["i1", "i3"]
    assert found["i1"].offsets == model.token_offsets(texts[1:2])[0]
    (whole,) = found["i3"].ranges(np.arange(1, 5).tolist())
    assert whole == (0, 3)
