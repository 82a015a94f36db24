"""Eight captioned images, and recipes of them, for the tests of mixing."""

import json

from hypothesis import strategies as st

from mvc_jax import files
from mvc_jax.mixing import recipes
from mvc_jax.mixing.recipe_file import read_recipes

M, L, D = 3, 16, 24  # maximum of partners, tokens, dims
# Eight images: four of class 0 (the third has no caption), three of 1, one of 2. Tokens
# are BOS, the caption's, a comma and five of the class prompt, EOS, padding.
ROWS = [
    {
        "id": f"i{i}",
        "label": label,
        "class_name": "abc"[label],
        "prompt": f"p{i}",
        "state": i + 1,
        "caption_start": 1,
        "caption_tokens": words,
        "tokens": words + 8,
    }
    for i, (label, words) in enumerate(
        [(0, 2), (1, 4), (0, 0), (0, 6), (2, 5), (1, 3), (0, 3), (1, 5)]
    )
]
CLASSES = recipes.classes_of(ROWS)
BY_ID = {row["id"]: row for row in ROWS}
ROW_OF = {row["id"]: i for i, row in enumerate(ROWS)}
SHAPE = {"length": L, "width": D}

DEFAULTS = recipes.Drawing()


def draw(k, drawing=DEFAULTS, seed=0, rows=ROWS):
    classes = recipes.classes_of(rows)
    return recipes.make_recipe(k, rows, classes, drawing, seed=seed, **SHAPE)


# Fields of `Drawing`: beartype checks a random item, which hypothesis forbids here.
drawings = st.fixed_dictionaries(
    dict(
        modes=st.lists(st.sampled_from(recipes.MODES), min_size=1, max_size=3).map(
            tuple
        ),
        tokens=st.integers(0, 5),
        tokens_most=st.sampled_from([0, 7]),
        positions=st.sampled_from(recipes.POSITIONS),
        class_prompt=st.booleans(),
        partner=st.sampled_from(recipes.PARTNERS),
        partners=st.integers(1, M),
        partner_prompt=st.sampled_from(recipes.PARTNER_PROMPTS),
        dims=st.integers(0, 5),
        dims_per_token=st.booleans(),
        dims_on=st.sampled_from(recipes.DIMS_ON),
        text_scale=st.sampled_from([(7.5, 7.5), (3.0, 9.0)]),
        image_scale=st.sampled_from([(1.5, 1.5), (0.0, 2.0)]),
    )
)
indices, seeds = st.integers(0, 200), st.integers(0, 9)


def json_copy(recipe):
    """The recipe as it is read from a file."""
    return json.loads(json.dumps(recipe))


def words_of(recipe, class_prompt):
    """Positions that are words in every prompt of a recipe, by definition."""
    shared = set(range(L))
    for id_ in (recipe["source"], *recipe["partners"]):
        row = BY_ID[id_]
        stop = 1 + row["caption_tokens"]
        shared &= {*range(1, row["tokens"] - 1 if class_prompt else stop)}
    return shared


def written(path, made):
    files.write_jsonl(path, made)
    return path


def read(path, any_partner=False):
    return read_recipes(path, ROWS, **SHAPE, any_partner=any_partner)


def some_recipes():
    """A recipe of each source, of mode "both", with two partners."""
    drawing = recipes.Drawing(modes=("both",), tokens=2, dims=2, partners=2)
    return [draw(k, drawing) for k in range(len(ROWS))]
