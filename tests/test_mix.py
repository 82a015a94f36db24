"""The mixing operations, and the stage that draws recipes."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_rows import (
    ROW_OF,
    ROWS,
    SHAPE,
    D,
    L,
    M,
    draw,
    drawings,
    indices,
    read,
    seeds,
    some_recipes,
    written,
)

from mvc_jax import files, mix
from mvc_jax.configs import common
from mvc_jax.errors import UserError
from mvc_jax.mixing import operations, recipes, unchanged
from mvc_jax.stage import Spec, open_stage, read_manifest

B = 4
WIDTHS = operations.Widths(positions=L, dims=D, partners=M)


def states(seed, *shape):
    return np.random.default_rng(seed).normal(size=(*shape, L, D)).astype(np.float32)


E, F = states(0, B), states(1, len(ROWS))


def numpy_mix(e, f, recipe):
    """The definition in `mixing/recipes.py`, number by number."""
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


mix_batch = jax.jit(jax.vmap(operations.mix))
coarse_batch, fine_batch = (
    jax.jit(jax.vmap(operations.coarse_mix)),
    jax.jit(jax.vmap(operations.fine_mix)),
)


def arrays_of(made):
    arrays = operations.as_arrays(made, ROW_OF, **SHAPE, widths=WIDTHS)
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
def test_a_padded_batch_follows_its_recipes(drawing, ks, seed):
    drawing = recipes.Drawing(**drawing)
    made = [draw(k, drawing, seed) for k in ks]
    mixed = mixed_by(made)
    by_id = dict(zip(ROW_OF, F, strict=True))
    expected = [numpy_mix(e, by_id, r) for e, r in zip(E, made, strict=True)]
    np.testing.assert_array_equal(mixed, expected)
    np.testing.assert_array_equal(mixed[:, 0], E[:, 0])  # BOS


@given(drawings, st.lists(indices, min_size=B, max_size=B))
@settings(deadline=None, max_examples=30)
def test_only_the_numbers_that_a_recipe_names_change(drawing, ks):
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
def test_mixing_nothing_is_the_identity(drawing, ks):
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
def test_entries_out_of_range_are_ignored_and_bos_is_never_replaced(positions, dims):
    """Also with position 0, or with dims in row 0, which are those of BOS."""
    f = F[np.zeros((B, M), np.int32)]
    donors = np.ones((B, L), np.int32)
    positions = np.tile(np.asarray(positions, np.int32), (B, 1))
    np.testing.assert_array_equal(coarse_batch(E, f, positions, donors), E)
    dims = np.tile(np.asarray(dims, np.int32), (B, L, 1))
    dims[:, 0] = np.arange(D)
    donors = np.ones((B, D), np.int32)
    np.testing.assert_array_equal(fine_batch(E, f, dims, donors), E)


def test_fine_mixing_follows_coarse_mixing():
    recipe = draw(0) | {"partners": ["i1", "i2"], "positions": [3], "donors": [0]}
    recipe |= {"dims": [[5]], "dim_donors": [1], "dim_tokens": [1, L]}
    mixed = mixed_by([recipe] * B)[0]
    np.testing.assert_array_equal(mixed[3, 5], F[2, 3, 5])
    np.testing.assert_array_equal(np.delete(mixed[3], 5), np.delete(F[1, 3], 5))


def test_widths_are_the_maxima_over_all_recipes():
    drawing = recipes.Drawing(tokens=3, dims=2, partners=2)
    made = [draw(k, drawing) for k in range(2 * len(ROWS))]
    assert operations.widths_of(made) == operations.Widths(
        positions=3, dims=2, partners=2
    )
    assert operations.widths_of([]) == operations.Widths(
        positions=0, dims=0, partners=1
    )
    few = operations.as_arrays(
        made[:1], ROW_OF, **SHAPE, widths=operations.widths_of(made)
    )
    assert few["positions"].shape == (1, 3) and few["dims"].shape == (1, L, 2)


EDITS = [  # valid changes by hand
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


@given(drawings, st.lists(indices, min_size=B, max_size=B), st.integers(0, L))
@settings(deadline=None, max_examples=60)
def test_a_recipe_that_changes_nothing_is_known(drawing, ks, shared):
    """Also where prompts are one, or begin with the same words."""
    drawing = recipes.Drawing(**drawing)
    begun = np.concatenate([E[:1], F])
    begun[1:6, :shared] = begun[1, :shared]  # i0 to i4 share their first words
    rows = [row | {"state": 8} if row["id"] == "i6" else row for row in ROWS]  # i7's
    by_id = {row["id"]: begun[row["state"]] for row in rows}
    made = [draw(k, drawing) for k in ks]
    expected = [
        np.array_equal(numpy_mix(by_id[r["source"]], by_id, r), by_id[r["source"]])
        for r in made
    ]
    assert unchanged.unchanged(made, rows, lambda i: begun[i]) == expected


def test_partners_without_another_caption_are_counted(encoded, caplog):
    """Captions A A A B: only fine mixing of B, and of A with B, changes anything."""
    same = {"i0", "i2", "i6"}
    rows = [r | {"prompt": "A", "state": 1} if r["id"] in same else r for r in ROWS]
    with caplog.at_level("WARNING", logger="absl"):
        workdir = encoded(rows)
        made = run(workdir, modes=("fine",), partner_prompt="any")
    counts = read_manifest(workdir, "mix")["counts"]
    equal = [r for r in made if {r["source"], *r["partners"]} <= same]
    assert equal and counts["unchanged"] == len(equal) + 4  # and four of i4 with itself
    assert f"in: a {len(equal)}, c 4" in caplog.text


# The stage.


@pytest.fixture
def made():
    return some_recipes()


@pytest.fixture
def encoded(tmp_path, write_shards):
    """A workdir up to `encode`, with the rows given or `ROWS`."""

    def make(rows=ROWS):
        stage = open_stage(tmp_path, Spec("encode", {}))
        files.write_jsonl(stage.folder / "prompts.jsonl", rows)
        array = np.concatenate([E[:1], F])
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
    counts = read_manifest(workdir, "mix")["counts"]
    # The only one of its class, and coarse ones with the image without a caption.
    assert counts["recipes"] == 3 * len(ROWS) and 3 <= counts["unchanged"] < 3 * 4
    with pytest.raises(UserError, match="mix.per_image: 3 -> 2"):
        run(workdir, per_image=2)
    with pytest.raises(UserError, match="mix.tokens: 2 -> 3"):
        run(workdir, per_image=4, tokens=3)
    assert (workdir / "mix" / "recipes.jsonl").read_bytes() == after


def test_rows_that_would_change_are_refused(encoded, monkeypatch):
    """As with another version of NumPy; the stage is left as it was."""
    workdir = encoded()
    few = run(workdir, per_image=2)
    monkeypatch.setattr(recipes.order, "generator", lambda *_: np.random.default_rng(7))
    with pytest.raises(UserError, match="different rows where the earlier ones were"):
        run(workdir, per_image=3)
    assert run(workdir, per_image=2) == few


def test_levels_can_be_added_later(encoded):
    workdir = encoded()
    made = run(workdir)
    assert not (workdir / "mix" / "levels.jsonl").exists()
    assert run(workdir, levels=True) == made
    levels = read(workdir / "mix" / "levels.jsonl")
    assert [r["level"] for r in levels[:2]] == ["tokens 1", "tokens 2"]


def test_recipes_can_be_read_from_an_edited_file(encoded, tmp_path, made):
    workdir = encoded()
    made[3] |= {"positions": [4, 5], "donors": [0, 1]}
    path = written(tmp_path / "mine.jsonl", made[::-1])
    assert run(workdir, file=str(path)) == made
    assert (
        run(workdir, file=str(path), per_image=9) == made
    )  # the file determines how many
    made[3]["positions"] = [0, 5]
    with pytest.raises(UserError, match="mix.file_sha256"):
        run(workdir, file=str(written(path, made)))


def test_scales_of_a_file_that_are_not_those_of_the_config_are_a_warning(
    encoded, tmp_path, made, caplog
):
    workdir = encoded()
    rows = [made[0], made[1] | {"text_scale": 3.0}, made[2] | {"text_scale": 4.0}]
    run(workdir, file=str(written(tmp_path / "mine.jsonl", rows)))
    assert "config.generate.text_scale=7.5 is not used" in caplog.text
    assert "from 3 to 4" in caplog.text
    assert "image_scale" not in caplog.text


def test_an_invalid_file_leaves_the_stage_empty(encoded, tmp_path, made):
    workdir = encoded()
    path = written(tmp_path / "mine.jsonl", [made[0] | {"source": "x"}])
    with pytest.raises(UserError, match="line 1: source 'x' is not a training image"):
        run(workdir, file=str(path))
    assert list((workdir / "mix").iterdir()) == []
    assert len(run(workdir, file=str(written(path, made[:1])))) == 1


def test_a_file_is_checked_without_ids_before_any_work(tmp_path, made):
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


def test_no_common_words_for_dims_is_an_error(encoded):
    workdir = encoded([row | {"caption_tokens": 0} for row in ROWS])
    fields = {"modes": ("fine",), "dims_on": "words"}
    with pytest.raises(UserError, match=r"config.mix.dims_on.*no source has words"):
        run(workdir, **fields)
    assert list((workdir / "mix").iterdir()) == []
    assert all(recipe["dims"] for recipe in run(workdir, modes=("fine",)))


def test_recipes_without_common_words_are_counted(encoded, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        made = run(encoded(), modes=("fine",), dims_on="words")
    empty = sum(not recipe["dims"] for recipe in made)
    assert 0 < empty < len(made)
    assert f"{empty} of {len(made)} recipes mix no dims" in caplog.text


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_short_captions_and_few_partners_are_warned_of_once(encoded, caplog):
    """Image i2 has no caption, so that recipes with it mix no tokens."""
    workdir = encoded()
    with caplog.at_level("WARNING", logger="absl"):
        made = run(workdir, tokens=3, partners=3)
    coarse = [r for r in made if r["mode"] == "coarse"]
    short = sum(len(r["positions"]) < 3 for r in coarse)
    assert 0 < short < len(coarse)
    tokens, single, few, unchanged_ = warnings_of(caplog)
    assert f"{short} of {len(coarse)} recipes mix fewer than 3" in tokens
    assert single.endswith("a single training image, mixed with itself, in: c")
    assert few.endswith(
        "fewer than 3 other images (config.mix.partners), so that all are mixed, in: b"
    )
    assert re.match(
        rf"\d+ of {len(made)} recipes change nothing, .*, in: a \d+, c 4", (unchanged_)
    )
    assert {len(r["partners"]) for r in made} == {1, 2, 3}


def test_with_partners_of_any_class_no_image_mixes_with_itself(encoded, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        made = run(encoded(), tokens=1, partner="any")
    assert all(r["partners"] != [r["source"]] for r in made)
    assert not any("itself" in text for text in warnings_of(caplog))
