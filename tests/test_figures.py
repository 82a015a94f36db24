"""Figures as data: what is written, drawn and read, and which images they show."""

import io

import made_runs
import made_sets
import numpy as np
import pytest
from etils import epath
from PIL import Image

from mvc_jax import files, generate, pictures, report
from mvc_jax.configs import common
from mvc_jax.data.splits import Split
from mvc_jax.errors import UserError
from mvc_jax.generation import figures, preview
from mvc_jax.generation.figures import Cell, Figure, Row
from mvc_jax.mixing import marked_words, recipes
from mvc_jax.stage import Spec, open_stage


def image(side, seed=0):
    drawn = np.random.default_rng(seed).integers(0, 256, (side, side, 3))
    return drawn.astype(np.uint8)


def test_a_figure_is_read_as_it_was_written(tmp_path):
    row = made_sets.ROWS[1]
    provenance = {key: row[key] for key in row if key != "label"}
    provenance["guidance_interval"] = [0.0, 0.5]
    cells = [
        Cell("real", image(5), figures.REAL, "cats", {"source": "s/1", "mode": "real"}),
        Cell("coarse", image(5, 1), "mixed", "cats", provenance),
        Cell("fine"),
    ]
    figure = Figure("A title", [Row("naïve", cells, 3), Row("b", cells[::-1])], ["x."])
    folder = epath.Path(tmp_path)
    figures.write(folder, "some", figure)
    found = figures.read(folder / "some.parquet")
    assert (found.title, found.notes) == ("A title", ["x."])
    assert [(row.name, row.number) for row in found.rows] == [("naïve", 3), ("b", None)]
    for mine, theirs in zip(figure.rows, found.rows, strict=True):
        for a, b in zip(mine.cells, theirs.cells, strict=True):
            assert (a.heading, a.set, a.label) == (b.heading, b.set, b.label)
            assert a.provenance == b.provenance
            np.testing.assert_array_equal(a.image, b.image)


@pytest.mark.parametrize(
    ("side", "tile"), [(5, 130), (64, 128), (100, 200), (130, 130)]
)
def test_an_image_is_drawn_at_a_whole_multiple_of_its_size(side, tile):
    shown = image(side)
    figure = Figure("", [Row("a", [Cell("one", shown)])])
    with Image.open(io.BytesIO(figures.png(figure))) as picture:
        pixels = np.asarray(picture)
    enlarged = shown.repeat(tile // side, 0).repeat(tile // side, 1)
    top = tile // 2
    places = [
        x
        for x in range(pixels.shape[1] - tile)
        if (pixels[top : top + tile, x : x + tile] == enlarged).all()
    ]
    assert len(places) == 1


def test_a_large_figure_is_drawn_smaller(monkeypatch):
    monkeypatch.setattr(figures, "_MAX_PIXELS", 4 * 50**2)
    rows = [Row("a", [Cell("one", image(60)), Cell("two", image(60))])] * 2
    with Image.open(io.BytesIO(figures.png(Figure("", rows)))) as picture:
        assert 2 * 50 < picture.height < 3 * 50


def made(tmp_path, pairs):
    """A set `mixed` of (source, mode), and training images a to f of two classes."""
    ids = tuple("abcdef")
    labels = np.asarray([0, 0, 0, 1, 1, 1], np.int32)
    pixels = np.stack([image(4, n) for n in range(6)])
    train = Split(pixels, labels, ids, ("x", "y"), grey=False)
    rows = [
        made_sets.ROWS[0]
        | {
            "index": k,
            "source": source,
            "partners": ["b"],
            "mode": mode,
            "label": int(labels[ids.index(source)]),
        }
        for k, (source, mode) in enumerate(pairs)
    ]
    images = np.stack([image(8, 10 + k) for k in range(len(rows))])
    folder = made_sets.write(
        tmp_path / "mixed", names=("x", "y"), rows=rows, images=images
    )
    cells = preview.Cells(train, dict.fromkeys(ids, "a prompt"))
    return cells, epath.Path(folder), images


def test_figures_1_to_3_show_two_images_of_each_mode(tmp_path):
    pairs = [("a", "fine"), ("a", "coarse"), ("c", "coarse"), ("c", "fine")]
    pairs += [("c", "coarse"), ("c", "coarse"), ("d", "fine"), ("e", "fine")]
    cells, folder, images = made(tmp_path, pairs)
    found = preview.coarse_fine_figure(cells, folder, rows=3)
    # Of x the source with most images; of y two have as many, and x has no third.
    sources = [row.cells[0].provenance["source"] for row in found.rows]
    assert sources == ["c", "d", "e"]
    row = found.rows[0]
    assert (row.name, row.number) == ("x", 0)
    shown = [(cell.heading, cell.provenance.get("index")) for cell in row.cells]
    assert shown == [("real", None), ("coarse", 2), ("coarse", 4), ("fine", 3)]
    for cell in row.cells[1:]:
        np.testing.assert_array_equal(cell.image, images[cell.provenance["index"]])
        assert (cell.set, cell.label) == ("mixed", "x")
    assert [cell.image is None for cell in found.rows[1].cells] == [0, 1, 1, 0]
    assert len(found.notes) == 1


def test_a_source_that_is_mixed_with_itself_is_mentioned(tmp_path, caplog):
    cells, folder, _ = made(tmp_path, [("b", "coarse"), ("d", "coarse")])
    found = preview.coarse_fine_figure(cells, folder, rows=2)
    sentence = "Mixing changes nothing in 1 of 2 images: the class has a single"
    assert found.notes[1].startswith(sentence) and sentence in caplog.text


def test_a_set_without_images_has_no_figure(tmp_path):
    cells, folder, _ = made(tmp_path, [("b", "coarse")])
    (folder / "data" / "train-00000.parquet").unlink()
    with pytest.raises(UserError, match="images in the set mixed to show, got none"):
        preview.coarse_fine_figure(cells, folder, rows=2)


def test_a_figure_of_an_older_version_is_kept_and_a_lost_one_drawn(tmp_path):
    stage = open_stage(epath.Path(tmp_path), Spec("generate", {}))
    data, picture = figures.paths(stage.folder, "levels")
    assert not generate._has_figure(stage, "levels")
    picture.write_bytes(b"png")
    stage.digests.add(picture)
    assert generate._has_figure(stage, "levels")
    data.write_bytes(b"parquet")
    stage.digests.add(data)
    assert generate._has_figure(stage, "levels")
    data.write_bytes(b"damaged")
    assert not generate._has_figure(stage, "levels")


def test_each_figure_is_requested_by_one_field(tmp_path):
    workdir, config = epath.Path(tmp_path), common.get_config()
    assert generate.requested_figures(config, workdir) == []
    config.generate.conditioning, config.generate.coarse_fine = "unmixed", 4
    assert generate.requested_figures(config, workdir) == [*generate.FIGURES[:2]]
    config.generate.limit = 2  # there is no set yet
    assert generate.requested_figures(config, workdir) == ["conditionings"]


def report_of(workdir):
    report.run(made_runs.make_config(), workdir)
    return made_runs.Page(workdir / "report" / "report.html")


def level_cell(heading, recipe, seed):
    return Cell(heading, image(8, seed), "mixed", "zero", recipe)


def test_the_report_shows_each_image_of_a_figure_with_what_it_was_made_of(
    tmp_path, write_shards
):
    workdir = made_runs.make_workdir(epath.Path(tmp_path))
    ids = [f"digits/{i:04d}" for i in (0, 10)]  # of the class zero
    rows = [
        {"id": id_, "prompt": text, "state": state}
        for state, (id_, text) in enumerate(
            zip(ids, ("a bold stroke", f"two thin {made_runs.EVIL}"), strict=True), 1
        )
    ]
    encode = workdir / "encode"
    files.write_jsonl(encode / "prompts.jsonl", rows)
    files.write_jsonl(
        encode / marked_words.OFFSETS,
        [{"offsets": x} for x in ([], [0, 1, 2, 6, 7, 13], [0, 3, 4, 8, 9, 10])],
    )
    write_shards(encode / "text_states", np.zeros((3, 16, 24), np.float32))
    recipe = {
        "source": ids[0],
        "partners": [ids[1]],
        "mode": "coarse",
        **recipes.NO_MIXING,
        "dim_tokens": [1, 1],
        "positions": [1, 2, 5],
        "donors": [0, 0, 0],
        "noise_seed": 4321,
        "text_scale": 7.5,
        "image_scale": 1.5,
        "prompt": rows[0]["prompt"],
        "index": 9,
    }
    heading = f"all {made_runs.EVIL}"
    other = {key: recipe[key] for key in ("source", "partners", "noise_seed")}
    cells = [
        Cell("source", image(8), figures.REAL, "zero", {"source": ids[0]}),
        level_cell(heading, recipe, 1),
        Cell("edges", image(8, 2), "controlnet", "zero", other | {"mode": "x"}),
        Cell("none"),
    ]
    figure = Figure("Mixing more and more", [Row("zero", cells)], ["A remark."])
    figures.write(workdir / "generate", "levels", figure)
    page = report_of(workdir)
    (mixed,) = page.images("zero, all")
    np.testing.assert_array_equal(mixed, image(8, 1))
    assert len(page.images("zero, edges")) == 1
    assert "script" not in {tag for tag, _ in page.tags}
    assert "A remark." in page.text and "4321" in page.text
    assert "edges of a real image (ControlNet)" in page.text
    assert "<mark>a bold</mark> stroke" in page.source
    assert "<mark>two thin</mark>" in page.source
    assert "2 tokens of words, 1 token of padding" in " ".join(page.text.split())


def test_the_report_shows_the_images_of_the_set_for_figures_1_to_3(tmp_path):
    workdir = made_runs.make_workdir(epath.Path(tmp_path))
    row = {"index": 2, "source": "digits/0000", "partners": [], "mode": "fine"}
    cells = [
        Cell("real", image(8), figures.REAL, "zero", {"source": "digits/0000"}),
        Cell("fine", image(8, 1), "mixed", "zero", row),
    ]
    figure = Figure("Coarse and fine mixing", [Row("zero", cells)])
    figures.write(workdir / "generate", "coarse_fine", figure)
    page = report_of(workdir)
    before = page.source.index('<table class="board">')
    table = page.source[before : page.source.index("</table>", before)]
    assert "2 of the set mixed" in table and "Training image" in table


@pytest.mark.parametrize("name", ["levels", "conditionings"])
def test_a_picture_of_an_older_version_is_shown(tmp_path, name):
    workdir = made_runs.make_workdir(epath.Path(tmp_path))
    content = pictures.png(Image.fromarray(image(10)))
    files.write_bytes(workdir / "generate" / f"{name}.png", content)
    assert len(report_of(workdir).images("more and more|under every")) == 1
