"""Mixing text states, and the recipes that say what is mixed with what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvc_jax import files, mix
from mvc_jax.configs import common
from mvc_jax.data import manifest

B, L, D = 4, 7, 9
BOS = np.full((1, D), -1.0, np.float32)  # CLIP is causal: its state is a constant


def states(seed, *shape):
    drawn = np.random.default_rng(seed).normal(size=(*shape, L, D)).astype(np.float32)
    drawn[..., :1, :] = BOS
    return drawn


def numpy_mix(e, f, positions, dims):
    mixed = e.copy()
    for position in positions:
        mixed[position] = f[position]
    for dim in dims:
        mixed[:, dim] = f[:, dim]
    return mixed


positions_lists = st.lists(st.integers(1, L - 1), unique=True)
dims_lists = st.lists(st.integers(0, D - 1), unique=True)
mix_batch = jax.jit(jax.vmap(mix.mix))
coarse_mix, fine_mix = jax.jit(mix.coarse_mix), jax.jit(mix.fine_mix)


@given(st.lists(st.tuples(positions_lists, dims_lists), min_size=B, max_size=B))
@settings(deadline=None, max_examples=50)
def test_the_padded_batch_equals_a_loop_over_ragged_lists(recipes):
    positions, dims = map(list, zip(*recipes, strict=True))
    e, f = states(0, B), states(1, B)
    padded = mix.pad_indices(positions, L, L), mix.pad_indices(dims, D, D)
    mixed = mix_batch(e, f, *padded)
    expected = [numpy_mix(*row) for row in zip(e, f, positions, dims, strict=True)]
    np.testing.assert_array_equal(mixed, expected)
    np.testing.assert_array_equal(mixed[:, 0], np.tile(BOS, (B, 1)))


@given(positions_lists, st.integers(L, L + 99))
@settings(deadline=None, max_examples=50)
def test_coarse_mixing_takes_over_whole_tokens_and_no_others(positions, none):
    e, f = states(0), states(1)
    mixed = coarse_mix(e, f, mix.pad_indices([positions], L, none)[0])
    taken = np.isin(np.arange(L), positions)
    np.testing.assert_array_equal(mixed, np.where(taken[:, None], f, e))


@given(dims_lists, st.integers(D, D + 99))
@settings(deadline=None, max_examples=50)
def test_fine_mixing_takes_over_the_same_dims_of_every_token_but_bos(dims, none):
    e, f = states(0), states(1)
    f[0] = 5.0
    mixed = fine_mix(e, f, mix.pad_indices([dims], D, none)[0])
    taken = np.isin(np.arange(D), dims)[None] & (np.arange(L) > 0)[:, None]
    np.testing.assert_array_equal(mixed, np.where(taken, f, e))


@pytest.mark.parametrize("mixer", [mix.coarse_mix, mix.fine_mix])
def test_mixing_nothing_is_the_identity(mixer):
    e, f, none = map(jnp.asarray, (states(0), states(1), np.zeros(0, np.int32)))
    np.testing.assert_array_equal(mixer(e, f, none), e)


# Recipes.

ROWS = [  # three images of class 0, two of class 1, one of class 2
    {"id": f"i{i}", "label": label, "class_name": "abc"[label]}
    | {"caption_start": 1, "caption_tokens": caption_tokens}
    | {"tokens": caption_tokens + 6}
    for i, (label, caption_tokens) in enumerate(
        [(0, 2), (1, 4), (0, 3), (2, 5), (1, 1), (0, 0)]
    )
]
OPTIONS = {"seed": 0, "modes": ("coarse", "fine"), "tokens": 3, "positions": "words"}
OPTIONS |= {"dims": 2, "length": 16, "width": D}


def recipe(k, rows=ROWS, **options):
    classes = {}
    for i, row in enumerate(rows):
        classes.setdefault(row["label"], []).append(i)
    return mix.make_recipe(k, rows, classes, **OPTIONS | options)


@pytest.mark.parametrize("positions", mix.POSITIONS)
@given(k=st.integers(0, 200), tokens=st.integers(0, 20), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_a_recipe_takes_what_was_asked_for_from_where_it_may(
    positions, k, tokens, seed
):
    made = recipe(k, tokens=tokens, positions=positions, seed=seed)
    source, partner = (
        next(row for row in ROWS if row["id"] == made[role])
        for role in ("source", "partner")
    )
    stop = {  # tokens are BOS, the caption's, the class prompt's, EOS, padding
        "caption": 1 + max(source["caption_tokens"], partner["caption_tokens"]),
        "words": max(source["tokens"], partner["tokens"]) - 1,
        "all": OPTIONS["length"],
    }[positions]
    coarse = made["mode"] == "coarse"
    assert len(made["positions"]) == (min(tokens, stop - 1) if coarse else 0)
    assert set(made["positions"]) <= set(range(1, stop))
    assert len(set(made["positions"])) == len(made["positions"])
    assert len(set(made["dims"])) == len(made["dims"]) == (0 if coarse else 2)
    assert set(made["dims"]) <= set(range(D))
    assert made == recipe(k, tokens=tokens, positions=positions, seed=seed)


def test_every_allowed_position_is_drawn_at_some_time():
    drawn = {p for k in range(0, 600, 12) for p in recipe(k)["positions"]}
    assert drawn == set(range(1, 8))  # i0 has 8 tokens, its partners 9 and 6


def test_captions_without_tokens_leave_coarse_mixing_nothing():
    rows = [row | {"caption_tokens": 0} for row in ROWS]
    assert recipe(0, rows, positions="caption")["positions"] == []


def test_words_never_reach_past_the_context():
    rows = [row | {"tokens": 99} for row in ROWS]
    assert recipe(0, rows, tokens=99)["positions"] == list(range(1, 16))


def test_each_round_uses_every_image_once_and_modes_take_turns():
    made = [recipe(k) for k in range(4 * len(ROWS))]
    for round_ in range(4):
        part = made[round_ * len(ROWS) : (round_ + 1) * len(ROWS)]
        assert [r["source"] for r in part] == [row["id"] for row in ROWS]
        assert {r["mode"] for r in part} == {OPTIONS["modes"][round_ % 2]}


def test_the_partner_is_every_other_image_of_the_class():
    pairs = {(r["source"], r["partner"]) for r in map(recipe, range(300))}
    classes = [("i0", "i2", "i5"), ("i1", "i4")]
    others = {(a, b) for names in classes for a in names for b in names if a != b}
    assert pairs == others | {("i3", "i3")}  # the only one of its class


def test_seeds_draw_differently():
    assert len({str([recipe(k, seed=s) for k in range(30)]) for s in range(5)}) == 5


def test_raising_per_image_only_appends(tmp_path, write_shards):
    """By the stage itself, which reads the length and width of the states."""
    written = []
    for per_image in (2, 3):
        workdir = tmp_path / str(per_image)
        encode = manifest.open_stage(workdir, "encode", {})
        files.write_jsonl(encode.folder / "prompts.jsonl", ROWS)
        names = write_shards(encode.folder / "text_states", states(0, 2))
        encode.finish(["prompts.jsonl", *names])
        config = common.get_config()
        config.mix.per_image = per_image
        mix.run(config, workdir)
        written.append(files.read_jsonl(workdir / "mix" / "recipes.jsonl"))
    few, many = written
    assert [r["index"] for r in many] == list(range(3 * len(ROWS)))
    assert many[: len(few)] == few
    assert len(few) == 2 * len(ROWS)
