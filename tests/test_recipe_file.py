"""Reading a recipe file that was edited by hand."""

import pytest
from recipe_rows import read, some_recipes, written

from mvc_jax.errors import UserError


@pytest.fixture
def made():
    return some_recipes()


DAMAGE = [  # an edit of row 2, of class 0, and the error
    ({"source": "x"}, "source 'x' is not a training image"),
    ({"partners": ["i3", "x"]}, "partner 'x' is not a training image"),
    ({"partners": []}, "no partner"),
    ({"partners": ["i3", "i1"]}, "'i1' is of class 'b', which requires"),
    ({"label": "b"}, "label is 'b', the source's is 'a'"),
    ({"mode": "coars"}, "mode is 'coars', not coarse or fine or both"),
    ({"mode": "coarse"}, 'takes no dims: write "both"'),
    ({"mode": "fine", "positions": [1], "donors": [0]}, "takes no positions"),
    ({"positions": [0, 3]}, "positions is [0, 3], not within [1, 16)"),
    ({"positions": [3, 16]}, "not within [1, 16)"),
    ({"positions": [3, 2]}, "positions is [3, 2], not ascending"),
    ({"positions": [3, 3]}, "not ascending"),
    ({"positions": [3]}, "2 donors, not 1"),
    ({"positions": [1.0, 2]}, "positions is [1.0, 2], not a list of integers"),
    ({"positions": [True, 2]}, "not a list of integers"),
    ({"positions": "1, 2"}, "not a list of integers"),
    ({"donors": [0, 2]}, "donors is [0, 2], not indices of 2 partners"),
    ({"donors": [0, -1]}, "not indices of 2 partners"),
    ({"dims": [[0, 24]]}, "dims is [0, 24], not within [0, 24)"),
    ({"dims": [[-1, 2]]}, "not within [0, 24)"),
    ({"dims": [[2, 1]]}, "dims is [2, 1], not ascending"),
    ({"dims": [[1]]}, "2 dim_donors, not 1"),
    ({"dims": [1, 2]}, "not a list of lists of integers"),
    ({"dims": [[1, 2]] * 3}, "3 lists of dims, not 1 or one per token (15)"),
    ({"dims": [[1, 2], [3]], "dim_tokens": [1, 3]}, "differ in length"),
    ({"dim_donors": [0, 7]}, "dim_donors is [0, 7], not indices of 2 partners"),
    ({"dim_tokens": [0, 16]}, "dim_tokens is [0, 16], not within [1, 16]"),
    ({"dim_tokens": [1, 17]}, "not within [1, 16]"),
    ({"dim_tokens": [5, 4]}, "not within [1, 16]"),
    ({"dim_tokens": [1]}, "not two integers"),
    ({"noise_seed": -1}, "noise_seed is -1, not an integer of at least 0"),
    ({"noise_seed": 2**31}, "not an integer"),
    ({"text_scale": -0.5}, "text_scale is -0.5, not a number of at least 0"),
    ({"image_scale": float("nan")}, "image_scale is NaN, not a number"),
    ({"image_scale": float("inf")}, "image_scale is Infinity, not a number"),
    ({"text_scale": "7.5"}, 'text_scale is "7.5", not a number'),
    ({"index": 1}, "index 1 is that of line 2"),
    ({"position": [1]}, "no such field: position"),
]


@pytest.mark.parametrize(
    ("edit", "message"), DAMAGE, ids=[message for _, message in DAMAGE]
)
def test_a_damaged_row_is_named_with_its_line(tmp_path, made, edit, message):
    made[2] |= {"positions": [1, 2], "donors": [0, 0]} | edit
    path = written(tmp_path / "recipes.jsonl", made)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: wanted valid recipes")
    assert "got 1 invalid: line 3: " in str(error.value)
    assert message in str(error.value)
    assert len(error.value.details) == 1


def test_all_damaged_rows_are_listed(tmp_path, made):
    made[1]["source"], made[4]["partners"] = "x", ["y"]
    del made[5]["dims"]
    path = written(tmp_path / "recipes.jsonl", made)
    text = path.read_text().split("\n")
    text[6] = text[6][:-1]
    path.write_text("\n".join([*text, "[1]"]))
    with pytest.raises(UserError, match="5 invalid: line 2: source 'x'") as error:
        read(path)
    starts = [line.partition(":")[0] for line in error.value.details]
    assert starts == ["line 2", "line 5", "line 6", "line 7", "line 10"]
    assert "no JSON" in error.value.details[3]
    assert "a list instead of an object" in error.value.details[4]


@pytest.mark.parametrize(
    ("kept", "message"), [(slice(1, None), "index 0:"), (slice(0, 0), "no rows")]
)
def test_no_index_may_be_missing(tmp_path, made, kept, message):
    with pytest.raises(UserError, match=message):
        read(written(tmp_path / "recipes.jsonl", made[kept]))


def test_a_huge_index_is_reported(tmp_path, made):
    """Without listing, or storing, all that are missing."""
    made[-1]["index"] = 2**31 - 1
    with pytest.raises(UserError, match=r"no row has index 7, 8, 9.*, \.\.\."):
        read(written(tmp_path / "recipes.jsonl", made))


def test_a_file_must_exist_and_be_text(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    for name, message in (
        ("none", "no such file"),
        ("", "a folder"),
        ("latin.jsonl", "U"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)


def test_partners_of_another_class_can_be_allowed(tmp_path, made):
    made[2]["partners"] = ["i3", "i1"]
    assert read(written(tmp_path / "recipes.jsonl", made), any_partner=True) == made
