"""Drawn recipes: functions of (seed, k), within what their settings allow."""

import dataclasses

from hypothesis import given, settings
from recipe_rows import (
    BY_ID,
    CLASSES,
    ROW_OF,
    ROWS,
    SHAPE,
    D,
    L,
    draw,
    drawings,
    indices,
    json_copy,
    seeds,
    words_of,
)

from mvc_jax import files
from mvc_jax.mixing import recipes
from mvc_jax.mixing.recipe_file import read_recipes


@given(drawings, indices, seeds)
@settings(deadline=None, max_examples=100)
def test_a_recipe_is_a_function_of_seed_and_index_and_is_valid(
    tmp_path_factory, drawing, k, seed
):
    drawing = recipes.Drawing(**drawing)
    made = draw(k, drawing, seed)
    assert json_copy(draw(k, drawing, seed)) == made
    path = tmp_path_factory.getbasetemp() / "recipe.jsonl"
    files.write_jsonl(path, [made | {"index": 0}])
    any_partner = drawing.partner == "any"
    read = read_recipes(path, ROWS, **SHAPE, any_partner=any_partner)
    assert read == [made | {"index": 0}]
    assert made["index"] == made["noise_seed"] == k


@given(drawings, indices, seeds)
@settings(deadline=None, max_examples=200)
def test_positions_are_allowed_ones(drawing, k, seed):
    drawing = recipes.Drawing(**drawing)
    made = draw(k, drawing, seed)
    positions, words = made["positions"], words_of(made, drawing.class_prompt)
    if made["mode"] == "fine":
        assert positions == []
        return
    allowed = words
    if drawing.positions == "all":
        allowed = set(range(1, L))
        if not drawing.class_prompt:
            for id_ in (made["source"], *made["partners"]):
                row = BY_ID[id_]
                allowed -= {*range(1 + row["caption_tokens"], row["tokens"] - 1)}
    assert set(positions) <= allowed
    high = max(drawing.tokens, drawing.tokens_most)
    assert min(drawing.tokens, len(allowed)) <= len(positions)
    assert len(positions) <= min(high, len(allowed))
    if drawing.positions == "first":
        assert positions == sorted(words)[: len(positions)]
    if drawing.positions == "span" and positions:
        assert positions == list(range(positions[0], positions[-1] + 1))


@given(drawings, indices, seeds)
@settings(deadline=None, max_examples=200)
def test_dims_are_of_allowed_tokens(drawing, k, seed):
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
def test_partners_are_of_the_class_unless_any_is_allowed(drawing, k, seed):
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


@given(drawings, indices, seeds)
@settings(deadline=None, max_examples=100)
def test_partners_of_another_prompt_are_preferred(drawing, k, seed):
    """As many as there are; with prompts that all differ, nothing else is drawn."""
    drawing = recipes.Drawing(**drawing)
    same = {"i0", "i2", "i6", "i1", "i5"}  # three of class a, two of b
    rows = [r | {"prompt": "p"} if r["id"] in same else r for r in ROWS]
    made = draw(k, drawing, seed, rows)
    either = [
        draw(k, dataclasses.replace(drawing, partner_prompt=choice), seed)
        for choice in recipes.PARTNER_PROMPTS
    ]
    assert either[0] == either[1]
    before = dataclasses.replace(drawing, partner_prompt="any")
    assert draw(k, before, seed, rows)["partners"] == either[0]["partners"]
    if drawing.partner_prompt == "other":
        source = made["source"]
        prompts = {row["id"]: row["prompt"] for row in rows}
        among = {r["id"] for r in rows} - {source}
        if drawing.partner == "class":
            among = {
                id_ for id_ in among if BY_ID[id_]["label"] == BY_ID[source]["label"]
            }
        others = {id_ for id_ in among if prompts[id_] != prompts[source]}
        found = {id_ for id_ in made["partners"] if id_ in others}
        assert len(found) == min(drawing.partners, len(others))
    assert len({*made["partners"]}) == len(either[0]["partners"])


def test_every_preferred_partner_is_drawn():
    rows = [r | {"prompt": "A"} if r["id"] != "i3" else r for r in ROWS]  # A A A B
    made = [draw(k, rows=rows) for k in range(40 * len(ROWS))]
    pairs = {(r["source"], *r["partners"]) for r in made if r["label"] == "a"}
    to_other = {("i0", "i3"), ("i2", "i3"), ("i6", "i3")}
    assert pairs == to_other | {("i3", id_) for id_ in ("i0", "i2", "i6")}
    two = recipes.Drawing(partners=2)
    made = [draw(k, two, rows=rows) for k in range(40 * len(ROWS))]
    pairs = {(r["source"], *r["partners"]) for r in made if r["source"] == "i0"}
    assert pairs == {("i0", "i3", "i2"), ("i0", "i3", "i6")}


def test_every_partner_position_donor_and_dim_is_drawn():
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


def test_ranges_are_sampled_and_fixed_values_are_kept():
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


def test_partners_and_dims_do_not_depend_on_tokens():
    few, many = (recipes.Drawing(modes=("both",), tokens=k) for k in (1, 2))
    for k in range(20):
        a, b = draw(k, few), draw(k, many)
        for name in ("partners", "dims", "dim_donors"):
            assert a[name] == b[name]


def test_a_class_prompt_before_the_caption_is_not_mixed():
    rows = [row | {"caption_start": 5} for row in ROWS]
    caption = draw(0, recipes.Drawing(tokens=9), rows=rows)["positions"]
    source, partner = (rows[ROW_OF[i]] for i in ("i0", draw(0)["partners"][0]))
    words = min(source["caption_tokens"], partner["caption_tokens"])
    assert caption == list(range(5, 5 + words))
    everywhere = recipes.Drawing(tokens=99, positions="all")
    assert {1, 2, 3, 4}.isdisjoint(draw(0, everywhere, rows=rows)["positions"])


def test_seeds_draw_different_recipes():
    assert len({str([draw(k, seed=s) for k in range(30)]) for s in range(5)}) == 5


def test_levels_increase_and_share_source_partners_and_noise():
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
        len(recipes.make_levels(ROWS, CLASSES, drawing, seed=0, **SHAPE, max_sources=1))
        == 6
    )
