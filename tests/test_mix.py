"""Mixing text states, and the recipes that say what is mixed with what."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax import files, mix
from mvc_jax.configs import common
from mvc_jax.data import manifest, recipes
from mvc_jax.data.recipe_file import read_recipes
from mvc_jax.errors import UserError

B, M, L, D = 4, 3, 16, 24
WIDTHS = mix.Widths(positions=L, dims=D, partners=M)

# Eight images: four of class 0 (the third has no caption), three of 1, one of 2. Tokens
# are BOS, the caption's, a comma and five of the class prompt, EOS, padding.
ROWS = [
    {"id": f"i{i}", "label": label, "class_name": "abc"[label], "prompt": f"p{i}"}
    | {"caption_start": 1, "caption_tokens": words, "tokens": words + 8}
    for i, (label, words) in enumerate(
        [(0, 2), (1, 4), (0, 0), (0, 6), (2, 5), (1, 3), (0, 3), (1, 5)]
    )
]
CLASSES = recipes.classes_of(ROWS)
BY_ID = {row["id"]: row for row in ROWS}
ROW_OF = {row["id"]: i for i, row in enumerate(ROWS)}
SHAPE = {"length": L, "width": D}


USUAL = recipes.Drawing()


def draw(k, drawing=USUAL, seed=0, rows=ROWS):
    classes = recipes.classes_of(rows)
    return recipes.make_recipe(k, rows, classes, drawing, seed=seed, **SHAPE)


# Their fields: beartype looks at a random item of a tuple, which no strategy may.
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
        dims=st.integers(0, 5),
        dims_per_token=st.booleans(),
        dims_on=st.sampled_from(recipes.DIMS_ON),
        text_scale=st.sampled_from([(7.5, 7.5), (3.0, 9.0)]),
        image_scale=st.sampled_from([(1.5, 1.5), (0.0, 2.0)]),
    )
)
indices, seeds = st.integers(0, 200), st.integers(0, 9)


def same_as_alone(recipe):
    """As a file keeps it, and as another process would draw it."""
    return json.loads(json.dumps(recipe))


def words_of(recipe, class_prompt):
    """Positions that are words in every prompt of a recipe, by its own definition."""
    shared = set(range(L))
    for id_ in (recipe["source"], *recipe["partners"]):
        row = BY_ID[id_]
        stop = 1 + row["caption_tokens"]
        shared &= {*range(1, row["tokens"] - 1 if class_prompt else stop)}
    return shared


# The operations.


def states(seed, *shape):
    return np.random.default_rng(seed).normal(size=(*shape, L, D)).astype(np.float32)


E, F = states(0, B), states(1, len(ROWS))


def numpy_mix(e, f, recipe):
    """By the definition in `data/recipes.py`, one number after the other."""
    mixed = e.copy()
    for position, donor in zip(recipe["positions"], recipe["donors"], strict=True):
        mixed[position] = f[recipe["partners"][donor]][position]
    start, stop = recipe["dim_tokens"]
    lists = recipe["dims"]
    for token in range(start, stop) if lists else ():
        dims = lists[0] if len(lists) == 1 else lists[token - start]
        for dim, donor in zip(dims, recipe["dim_donors"], strict=True):
            mixed[token, dim] = f[recipe["partners"][donor]][token, dim]
    return mixed


mix_batch = jax.jit(jax.vmap(mix.mix))
coarse_batch, fine_batch = (
    jax.jit(jax.vmap(mix.coarse_mix)),
    jax.jit(jax.vmap(mix.fine_mix)),
)


def arrays_of(made):
    arrays = mix.as_arrays(made, ROW_OF, **SHAPE, widths=WIDTHS)
    for name, array in arrays.items():
        assert array.shape[0] == B
        assert array.dtype == (np.float32 if "scale" in name else np.int32)
    return arrays


def mixed_by(made, e=E):
    arrays = arrays_of(made)
    names = ("positions", "donors", "dims", "dim_donors")
    return np.asarray(
        mix_batch(e, F[arrays["partners"]], *(arrays[name] for name in names))
    )


@given(drawings, st.lists(indices, min_size=B, max_size=B), seeds)
@settings(deadline=None, max_examples=100)
def test_a_padded_batch_is_what_its_recipes_say(drawing, ks, seed):
    drawing = recipes.Drawing(**drawing)
    made = [draw(k, drawing, seed) for k in ks]
    mixed = mixed_by(made)
    by_id = dict(zip(ROW_OF, F, strict=True))
    expected = [numpy_mix(e, by_id, r) for e, r in zip(E, made, strict=True)]
    np.testing.assert_array_equal(mixed, expected)
    np.testing.assert_array_equal(mixed[:, 0], E[:, 0])  # BOS


@given(drawings, st.lists(indices, min_size=B, max_size=B))
@settings(deadline=None, max_examples=30)
def test_only_what_a_recipe_names_differs(drawing, ks):
    drawing = recipes.Drawing(**drawing)
    made = [draw(k, drawing) for k in ks]
    for e, mixed, recipe in zip(E, mixed_by(made), made, strict=True):
        named = np.zeros((L, D), bool)
        named[recipe["positions"]] = True
        start, stop = recipe["dim_tokens"]
        for i, token in enumerate(range(start, stop)):
            if recipe["dims"]:
                named[token, recipe["dims"][i % len(recipe["dims"])]] = True
        np.testing.assert_array_equal(mixed != e, named)


@given(drawings, st.lists(indices, min_size=B, max_size=B))
@settings(deadline=None, max_examples=30)
def test_nothing_to_mix_is_the_identity(drawing, ks):
    drawing = recipes.Drawing(**drawing)
    nothing = dataclasses.replace(drawing, tokens=0, tokens_most=0, dims=0)
    made = [draw(k, nothing) for k in ks]
    assert all(r["positions"] == r["dims"] == [] for r in made)
    np.testing.assert_array_equal(mixed_by(made), E)


@given(
    st.lists(st.integers(L, 999) | st.integers(-999, 0), min_size=L, max_size=L),
    st.lists(st.integers(D, 999) | st.integers(-999, -1), min_size=D, max_size=D),
)
@settings(deadline=None, max_examples=30)
def test_entries_outside_stand_for_none_and_bos_is_never_touched(positions, dims):
    """Also where a caller asks for BOS: by position 0, or by dims in row 0."""
    f = F[np.zeros((B, M), np.int32)]
    donors = np.ones((B, L), np.int32)
    positions = np.tile(np.asarray(positions, np.int32), (B, 1))
    np.testing.assert_array_equal(coarse_batch(E, f, positions, donors), E)
    dims = np.tile(np.asarray(dims, np.int32), (B, L, 1))
    dims[:, 0] = np.arange(D)
    donors = np.ones((B, D), np.int32)
    np.testing.assert_array_equal(fine_batch(E, f, dims, donors), E)


def test_fine_mixing_is_on_top_of_coarse_mixing():
    recipe = draw(0) | {"partners": ["i1", "i2"], "positions": [3], "donors": [0]}
    recipe |= {"dims": [[5]], "dim_donors": [1], "dim_tokens": [1, L]}
    mixed = mixed_by([recipe] * B)[0]
    np.testing.assert_array_equal(mixed[3, 5], F[2, 3, 5])
    np.testing.assert_array_equal(np.delete(mixed[3], 5), np.delete(F[1, 3], 5))


def test_widths_are_the_most_of_all_recipes():
    drawing = recipes.Drawing(tokens=3, dims=2, partners=2)
    made = [draw(k, drawing) for k in range(2 * len(ROWS))]
    assert mix.widths_of(made) == mix.Widths(positions=3, dims=2, partners=2)
    assert mix.widths_of([]) == mix.Widths(positions=0, dims=0, partners=1)
    few = mix.as_arrays(made[:1], ROW_OF, **SHAPE, widths=mix.widths_of(made))
    assert few["positions"].shape == (1, 3) and few["dims"].shape == (1, L, 2)


# Recipes.


@given(drawings, indices, seeds)
@settings(deadline=None, max_examples=100)
def test_a_recipe_is_a_function_of_seed_and_index_and_is_accepted(
    tmp_path_factory, drawing, k, seed
):
    drawing = recipes.Drawing(**drawing)
    made = draw(k, drawing, seed)
    assert same_as_alone(draw(k, drawing, seed)) == made
    path = tmp_path_factory.getbasetemp() / "recipe.jsonl"
    files.write_jsonl(path, [made | {"index": 0}])
    any_partner = drawing.partner == "any"
    read = read_recipes(path, ROWS, **SHAPE, any_partner=any_partner)
    assert read == [made | {"index": 0}]
    assert made["index"] == made["noise_seed"] == k


@given(drawings, indices, seeds)
@settings(deadline=None, max_examples=200)
def test_positions_are_where_they_may_be(drawing, k, seed):
    drawing = recipes.Drawing(**drawing)
    made = draw(k, drawing, seed)
    taken, words = made["positions"], words_of(made, drawing.class_prompt)
    if made["mode"] == "fine":
        assert taken == []
        return
    allowed = words
    if drawing.positions == "all":
        allowed = set(range(1, L))
        if not drawing.class_prompt:
            for id_ in (made["source"], *made["partners"]):
                row = BY_ID[id_]
                allowed -= {*range(1 + row["caption_tokens"], row["tokens"] - 1)}
    assert set(taken) <= allowed
    most = max(drawing.tokens, drawing.tokens_most)
    assert min(drawing.tokens, len(allowed)) <= len(taken) <= min(most, len(allowed))
    if drawing.positions == "first":
        assert taken == sorted(words)[: len(taken)]
    if drawing.positions == "span" and taken:
        assert taken == list(range(taken[0], taken[0] + len(taken)))


@given(drawings, indices, seeds)
@settings(deadline=None, max_examples=200)
def test_dims_are_where_they_may_be(drawing, k, seed):
    drawing = recipes.Drawing(**drawing)
    made = draw(k, drawing, seed)
    tokens = sorted(words_of(made, drawing.class_prompt))
    if drawing.dims_on == "all":
        tokens = list(range(1, L))
    if made["mode"] == "coarse" or not drawing.dims or not tokens:
        assert made["dims"] == []
        return
    assert list(range(*made["dim_tokens"])) == tokens
    assert len(made["dims"]) == (len(tokens) if drawing.dims_per_token else 1)
    assert {len(dims) for dims in made["dims"]} == {drawing.dims}
    if drawing.dims_per_token and len(tokens) == L - 1 and drawing.dims > 1:
        assert len({tuple(dims) for dims in made["dims"]}) > 1


@given(drawings, indices, seeds)
@settings(deadline=None, max_examples=200)
def test_partners_stay_in_the_class_unless_asked(drawing, k, seed):
    drawing = recipes.Drawing(**drawing)
    made = draw(k, drawing, seed)
    source, partners = made["source"], made["partners"]
    assert made["label"] == BY_ID[source]["class_name"]
    assert len(set(partners)) == len(partners)
    among = {*BY_ID}
    if drawing.partner == "class":
        label = BY_ID[source]["label"]
        among = {row["id"] for row in ROWS if row["label"] == label}
    others = among - {source}
    assert set(partners) <= (others or {source})
    assert len(partners) == min(drawing.partners, max(len(others), 1))
    for donors in (made["donors"], made["dim_donors"]):
        assert set(donors) <= set(range(len(partners)))


def test_every_partner_position_and_donor_is_drawn_at_some_time():
    drawing = recipes.Drawing(modes=("both",), tokens=2, partners=2, dims=3)
    made = [draw(k, drawing) for k in range(60 * len(ROWS))]
    pairs = {(r["source"], id_) for r in made for id_ in r["partners"]}
    groups = [[ROWS[i]["id"] for i in members] for members in CLASSES.values()]
    others = {(a, b) for names in groups for a in names for b in names if a != b}
    assert pairs == others | {("i4", "i4")}  # the only one of its class
    mine = [r for r in made if r["source"] == "i1"]  # with i5 and i7: three words
    assert {p for r in mine for p in r["positions"]} == {1, 2, 3}
    assert {d for r in mine for d in r["donors"]} == {0, 1}
    assert {d for r in made for dims in r["dims"] for d in dims} == set(range(D))


def test_each_round_uses_every_image_once_and_modes_take_turns():
    made = [draw(k) for k in range(4 * len(ROWS))]
    for round_ in range(4):
        part = made[round_ * len(ROWS) : (round_ + 1) * len(ROWS)]
        assert [r["source"] for r in part] == [row["id"] for row in ROWS]
        assert {r["mode"] for r in part} == {("coarse", "fine")[round_ % 2]}


def test_a_range_is_drawn_from_and_a_fixed_value_is_kept():
    ranged = recipes.Drawing(
        positions="all",
        class_prompt=True,
        tokens=2,
        tokens_most=5,
        text_scale=(3.0, 9.0),
    )
    made = [draw(k, ranged) for k in range(40 * len(ROWS))]
    coarse = [r for r in made if r["mode"] == "coarse"]
    assert {len(r["positions"]) for r in coarse} == {2, 3, 4, 5}
    scales = [r["text_scale"] for r in made]
    assert 3 <= min(scales) < 4 and 8 < max(scales) <= 9
    assert {r["image_scale"] for r in made} == {1.5}


def test_other_tokens_leave_partners_and_dims_what_they_were():
    few, many = (recipes.Drawing(modes=("both",), tokens=k) for k in (1, 2))
    for k in range(20):
        a, b = draw(k, few), draw(k, many)
        for name in ("partners", "dims", "dim_donors"):
            assert a[name] == b[name]


def test_a_class_prompt_before_the_caption_is_left_alone():
    rows = [row | {"caption_start": 5} for row in ROWS]
    caption = draw(0, recipes.Drawing(tokens=9), rows=rows)["positions"]
    source, partner = (rows[ROW_OF[i]] for i in ("i0", draw(0)["partners"][0]))
    words = min(source["caption_tokens"], partner["caption_tokens"])
    assert caption == list(range(5, 5 + words))
    everywhere = recipes.Drawing(tokens=99, positions="all")
    assert {1, 2, 3, 4}.isdisjoint(draw(0, everywhere, rows=rows)["positions"])


def test_seeds_draw_differently():
    assert len({str([draw(k, seed=s) for k in range(30)]) for s in range(5)}) == 5


def test_levels_mix_more_and_more_of_the_same():
    drawing = recipes.Drawing(dims=3, partners=2)
    made = recipes.make_levels(ROWS, CLASSES, drawing, seed=0, **SHAPE)
    assert [r["index"] for r in made] == list(range(6 * 3))
    for group in (made[i : i + 6] for i in range(0, 18, 6)):
        assert [r["level"] for r in group] == [
            f"{what} {level}" for what in ("tokens", "dims") for level in (1, 2, 3)
        ]
        for name in ("source", "partners", "label", "noise_seed"):
            assert all(r[name] == group[0][name] for r in group)
        words, padded, everything = (set(r["positions"]) for r in group[:3])
        assert words == words_of(group[0], False)
        ends = max(
            BY_ID[i]["tokens"] for i in (group[0]["source"], *group[0]["partners"])
        )
        assert padded == words | set(range(ends, L)[: len(words)])
        assert everything == set(range(1, L))
        few, quarter, half = (set(r["dims"][0]) for r in group[3:])
        assert few < quarter < half
        assert [len(few), len(quarter), len(half)] == [3, D // 4, D // 2]
    first_rounds = {r["source"]: r["noise_seed"] for r in made}
    assert all(ROWS[k]["id"] == id_ for id_, k in first_rounds.items())
    assert (
        len(
            recipes.make_levels(ROWS, CLASSES, drawing, seed=0, **SHAPE, most_sources=1)
        )
        == 6
    )


# The file, edited by hand.


def written(path, made):
    files.write_jsonl(path, made)
    return path


def read(path, any_partner=False):
    return read_recipes(path, ROWS, **SHAPE, any_partner=any_partner)


@pytest.fixture
def made():
    drawing = recipes.Drawing(modes=("both",), tokens=2, dims=2, partners=2)
    return [draw(k, drawing) for k in range(len(ROWS))]


EDITS = [  # what a person may well do
    {"positions": [], "donors": [], "mode": "fine"},
    {"positions": [1, 15], "donors": [1, 0]},
    {"dims": [], "dim_donors": [], "mode": "coarse"},
    {"dims": [[]], "dim_donors": []},
    {"dims": [[0, 1], [2, 3]], "dim_donors": [0, 1], "dim_tokens": [2, 4]},
    {"partners": ["i3"], "donors": [0, 0], "dim_donors": [0, 0]},
    {"partners": ["i3", "i3"]},
    {"noise_seed": 12345},
    {"text_scale": 0, "image_scale": 3},
    {"level": "tokens 1"},
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_valid_edits_are_accepted_and_followed(tmp_path, made, edit):
    made[0] |= {"positions": [1, 2], "donors": [0, 0]} | edit
    path = written(tmp_path / "recipes.jsonl", made[::-1])
    path.write_text("\ufeff" + path.read_text().replace("\n", "\n\n"))
    assert read(path) == made
    mixed = mixed_by(made[:B])
    by_id = dict(zip(ROW_OF, F, strict=True))
    np.testing.assert_array_equal(mixed[0], numpy_mix(E[0], by_id, made[0]))


DAMAGE = [  # an edit of row 2, of class 0, and what is said of it
    ({"source": "x"}, "source 'x' is no training image"),
    ({"partners": ["i3", "x"]}, "partner 'x' is no training image"),
    ({"partners": []}, "no partner"),
    ({"partners": ["i3", "i1"]}, "'i1' is of class 'b', which needs"),
    ({"label": "b"}, "label is 'b', the source's is 'a'"),
    ({"mode": "coars"}, "mode is 'coars', not coarse or fine or both"),
    ({"mode": "coarse"}, 'takes no dims: write "both"'),
    ({"mode": "fine", "positions": [1], "donors": [0]}, "takes no positions"),
    ({"positions": [0, 3]}, "positions is [0, 3], not within [1, 16)"),
    ({"positions": [3, 16]}, "not within [1, 16)"),
    ({"positions": [3, 2]}, "positions is [3, 2], not ascending"),
    ({"positions": [3, 3]}, "not ascending"),
    ({"positions": [3]}, "2 donors for 1 places"),
    ({"positions": [1.0, 2]}, "positions is [1.0, 2], not a list of whole numbers"),
    ({"positions": [True, 2]}, "not a list of whole numbers"),
    ({"positions": "1, 2"}, "not a list of whole numbers"),
    ({"donors": [0, 2]}, "donors is [0, 2], not indices of 2 partners"),
    ({"donors": [0, -1]}, "not indices of 2 partners"),
    ({"dims": [[0, 24]]}, "dims is [0, 24], not within [0, 24)"),
    ({"dims": [[-1, 2]]}, "not within [0, 24)"),
    ({"dims": [[2, 1]]}, "dims is [2, 1], not ascending"),
    ({"dims": [[1]]}, "2 dim_donors for 1 places"),
    ({"dims": [1, 2]}, "not a list of lists of whole numbers"),
    ({"dims": [[1, 2]] * 3}, "3 lists of dims, not 1 or, as dim_tokens says, 15"),
    ({"dims": [[1, 2], [3]], "dim_tokens": [1, 3]}, "differ in length"),
    ({"dim_donors": [0, 7]}, "dim_donors is [0, 7], not indices of 2 partners"),
    ({"dim_tokens": [0, 16]}, "dim_tokens is [0, 16], not within [1, 16]"),
    ({"dim_tokens": [1, 17]}, "not within [1, 16]"),
    ({"dim_tokens": [5, 4]}, "not within [1, 16]"),
    ({"dim_tokens": [1]}, "not two whole numbers"),
    ({"noise_seed": -1}, "noise_seed is -1, not a whole number of at least 0"),
    ({"noise_seed": 2**31}, "not a whole number"),
    ({"text_scale": -0.5}, "text_scale is -0.5, not a number of at least 0"),
    ({"image_scale": float("nan")}, "image_scale is NaN, not a number"),
    ({"image_scale": float("inf")}, "image_scale is Infinity, not a number"),
    ({"text_scale": "7.5"}, 'text_scale is "7.5", not a number'),
    ({"index": 1}, "index 1 is taken by line 2"),
    ({"position": [1]}, "no such field: position"),
]


@pytest.mark.parametrize(("edit", "said"), DAMAGE, ids=[said for _, said in DAMAGE])
def test_a_damaged_row_is_named_with_its_line(tmp_path, made, edit, said):
    made[2] |= {"positions": [1, 2], "donors": [0, 0]} | edit
    path = written(tmp_path / "recipes.jsonl", made)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: wanted recipes that can be followed")
    assert "got 1 that cannot: line 3: " in str(error.value)
    assert said in str(error.value)
    assert len(error.value.details) == 1


def test_all_damaged_rows_are_listed(tmp_path, made):
    made[1]["source"], made[4]["partners"] = "x", ["y"]
    del made[5]["dims"]
    path = written(tmp_path / "recipes.jsonl", made)
    text = path.read_text().split("\n")
    text[6] = text[6][:-1]
    path.write_text("\n".join([*text, "[1]"]))
    with pytest.raises(UserError, match="5 that cannot: line 2: source 'x'") as error:
        read(path)
    starts = [line.partition(":")[0] for line in error.value.details]
    assert starts == ["line 2", "line 5", "line 6", "line 7", "line 10"]
    assert "no JSON" in error.value.details[3]
    assert "a list instead of an object" in error.value.details[4]


@pytest.mark.parametrize(
    ("kept", "said"), [(slice(1, None), "index 0:"), (slice(0, 0), "no row at all")]
)
def test_no_index_may_be_missing(tmp_path, made, kept, said):
    with pytest.raises(UserError, match=said):
        read(written(tmp_path / "recipes.jsonl", made[kept]))


def test_a_file_must_be_there_and_be_text(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    for name, said in (
        ("none", "no such file"),
        ("", "a folder"),
        ("latin.jsonl", "U"),
    ):
        with pytest.raises(UserError, match=said):
            read(tmp_path / name)


def test_partners_of_another_class_are_for_those_who_ask(tmp_path, made):
    made[2]["partners"] = ["i3", "i1"]
    assert read(written(tmp_path / "recipes.jsonl", made), any_partner=True) == made


# The stage.


@pytest.fixture
def encoded(tmp_path, write_shards):
    """A workdir up to `encode`, with the rows given or `ROWS`."""

    def make(rows=ROWS):
        stage = manifest.open_stage(tmp_path, "encode", {})
        files.write_jsonl(stage.folder / "prompts.jsonl", rows)
        array = np.zeros((2, L, D), np.float32)
        names = write_shards(stage.folder / "text_states", array)
        stage.finish(["prompts.jsonl", *names])
        return tmp_path

    return make


def run(workdir, **fields):
    config = common.get_config()
    config.mix.update({"tokens": 2, "dims": 3} | fields)
    mix.run(config, workdir)
    return files.read_jsonl(workdir / "mix" / "recipes.jsonl")


def test_raising_per_image_appends(encoded):
    workdir = encoded()
    few = run(workdir, per_image=2)
    before = (workdir / "mix" / "recipes.jsonl").read_bytes()
    assert run(workdir, per_image=2) == few
    many = run(workdir, per_image=3)
    assert [r["index"] for r in many] == list(range(3 * len(ROWS)))
    assert len(few) == 2 * len(ROWS)
    after = (workdir / "mix" / "recipes.jsonl").read_bytes()
    assert after.startswith(before) and len(after) > len(before)
    counts = manifest.read_manifest(workdir, "mix")["counts"]
    assert counts == {"recipes": 3 * len(ROWS)}
    with pytest.raises(UserError, match="mix.per_image: 3 -> 2"):
        run(workdir, per_image=2)
    with pytest.raises(UserError, match="mix.tokens: 2 -> 3"):
        run(workdir, per_image=4, tokens=3)
    assert (workdir / "mix" / "recipes.jsonl").read_bytes() == after


def test_rows_that_would_change_are_refused(encoded, monkeypatch):
    """Another version of NumPy, say; what was there stays, manifest and all."""
    workdir = encoded()
    few = run(workdir, per_image=2)
    monkeypatch.setattr(recipes.order, "generator", lambda *_: np.random.default_rng(7))
    with pytest.raises(UserError, match="other rows for what was there already"):
        run(workdir, per_image=3)
    assert run(workdir, per_image=2) == few


def test_levels_can_be_asked_for_later(encoded):
    workdir = encoded()
    made = run(workdir)
    assert not (workdir / "mix" / "levels.jsonl").exists()
    assert run(workdir, levels=True) == made
    levels = read(workdir / "mix" / "levels.jsonl")
    assert [r["level"] for r in levels[:2]] == ["tokens 1", "tokens 2"]


def test_an_edited_file_is_handed_back(encoded, tmp_path, made):
    workdir = encoded()
    made[3] |= {"positions": [4, 5], "donors": [0, 1]}
    path = written(tmp_path / "mine.jsonl", made[::-1])
    assert run(workdir, file=str(path)) == made
    assert run(workdir, file=str(path), per_image=9) == made  # the file says how many
    made[3]["positions"] = [0, 5]
    with pytest.raises(UserError, match="mix.file_sha256"):
        run(workdir, file=str(written(path, made)))


def test_a_wrong_file_leaves_the_stage_unbegun(encoded, tmp_path, made):
    workdir = encoded()
    path = written(tmp_path / "mine.jsonl", [made[0] | {"source": "x"}])
    with pytest.raises(UserError, match="line 1: source 'x' is no training image"):
        run(workdir, file=str(path))
    assert list((workdir / "mix").iterdir()) == []
    assert len(run(workdir, file=str(written(path, made[:1])))) == 1


def test_what_needs_no_ids_is_looked_at_before_any_work(tmp_path, made):
    config = common.get_config()
    config.mix.file = str(written(tmp_path / "mine.jsonl", made))
    mix.check(config)
    written(tmp_path / "mine.jsonl", [*made[:-1], made[-1] | {"text_scale": -1}])
    with pytest.raises(UserError, match="line 8: text_scale is -1"):
        mix.check(config)
    config.mix.file = ""
    config.mix.dims = 99
    with pytest.raises(UserError, match="at most the 64 dims"):
        mix.check(config)


def test_more_tokens_than_any_caption_has_is_an_error(encoded):
    workdir = encoded()
    with pytest.raises(UserError, match="config.mix.tokens") as error:
        run(workdir, tokens=7)
    assert "the longest caption, of i3 ('p3'), has 6" in str(error.value)
    assert list((workdir / "mix").iterdir()) == []
    with pytest.raises(UserError, match="at most the 24 dims"):
        run(workdir, dims=25)
    assert len(run(workdir, tokens=7, class_prompt=True)) == 4 * len(ROWS)


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_short_captions_and_lone_images_are_told_of_once(encoded, caplog):
    """Of i2, without a caption, whoever it is mixed with takes nothing over."""
    workdir = encoded()
    with caplog.at_level("WARNING", logger="absl"):
        made = run(workdir, tokens=3, partners=3)
    coarse = [r for r in made if r["mode"] == "coarse"]
    short = sum(len(r["positions"]) < 3 for r in coarse)
    assert 0 < short < len(coarse)
    short_of, lone, few = warnings_of(caplog)
    assert f"{short} of {len(coarse)} recipes take over fewer than 3" in short_of
    assert lone.endswith("with nothing to mix it with but itself, in: c")
    assert few.endswith(
        "fewer than 3 other images (config.mix.partners); all there are mix, in: b"
    )
    assert {len(r["partners"]) for r in made} == {1, 2, 3}


def test_with_any_partner_nobody_is_alone(encoded, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        made = run(encoded(), tokens=1, partner="any")
    assert all(r["partners"] != [r["source"]] for r in made)
    assert not any("itself" in text for text in warnings_of(caplog))
