"""The report in a browser: Chromium without a window, where there is one.

A page has no scripts. Copies of it, in frames of several widths, are measured by a
script of the test.
"""

import html
import json
import pathlib
import re
import shutil
import subprocess

import pytest
from made_runs import NAMES, make_config, make_workdir, measured

from mvc_jax import report
from mvc_jax.generation.conditionings import CONDITIONINGS

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser on this machine: none of {', '.join(_NAMES)}"
)
WIDTHS = (390, 820, 1400)
PAPER = 680  # pixels of a printed page without its margins
LONG = "Pneumonoultramicroscopicsilicovolcanoconiosis_with-no-break-in-its-name"
RUNS = {  # name -> (class names, classes with images, seeds, sets)
    "ten": (list(NAMES), 10, 2, ("mixed", "unmixed")),
    "two": (["healthy", "מוח עם גידול"], 2, 1, ("mixed", "unmixed")),
    "hundred": ([f"{LONG} {k}" for k in range(98)] + ["手写数字", "رقم مكتوب"], 10, 2)
    + (("mixed", "unmixed"),),
    "nothing": (list(NAMES), 10, 2, ()),
    "all sets": (list(NAMES), 10, 2, tuple(CONDITIONINGS)),
}
SEEN = [("ten", width) for width in WIDTHS]
SEEN += [("two", 390), ("hundred", 390), ("hundred", 1400), ("nothing", 390)]
SEEN += [("all sets", width) for width in WIDTHS]
PRINTED = ("ten", "hundred", "all sets")
SCRIPT = pathlib.Path(__file__).with_name("measure_pages.js").read_text()


def browse(folder, page, *flags):
    """Opens a page; returns what it printed and logged."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={folder / 'profile'}", "--disable-dev-shm-usage"]
    command += ["--virtual-time-budget=5000", "--hide-scrollbars", *flags]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of each run."""
    found = {}
    for name, (names, classes, seeds, made) in RUNS.items():
        workdir = tmp_path_factory.mktemp(name)
        metrics = measured(names, classes, seeds=seeds)
        make_workdir(workdir, made=made, classes=classes, **metrics)
        report.run(make_config(), workdir)
        found[name] = workdir / "report" / "report.html"
    return found


@pytest.fixture(scope="module")
def seen(pages, tmp_path_factory):
    """What the script measured, by run and width, or "print"."""
    folder = tmp_path_factory.mktemp("browser")
    frames = []
    for name, path in pages.items():
        text = re.sub("<meta http-equiv[^>]*>", "", path.read_text())
        stored = re.findall(r'<image[^>]* href="([^"]*)"', text)
        shown = "".join(f'<img hidden src="{uri}">' for uri in stored)
        text = text.replace("</body>", f"{shown}</body>")  # they know if they load
        printed = text.replace("@media print", "@media all")
        printed = re.sub(r"@media screen[^{]*", "@media not all ", printed)
        kinds = {f"{name} {w}": (w, text) for n, w in SEEN if n == name}
        if name in PRINTED:
            kinds[f"{name} print"] = (PAPER, printed)
        for title, (width, content) in kinds.items():
            frames.append(
                f'<iframe title="{title}" width="{width}" height="900" '
                f'style="border: 0" srcdoc="{html.escape(content)}"></iframe>'
            )
    parent = folder / "frames.html"
    parent.write_text(
        f"<!doctype html><meta charset=utf-8>{''.join(frames)}<script>{SCRIPT}</script>"
    )
    printed, _ = browse(folder, parent, "--window-size=1600,1000", "--dump-dom")
    content = re.search(r'<pre id="result">(.*?)</pre>', printed, re.DOTALL)
    assert content, printed[-1000:]
    return json.loads(html.unescape(content[1]))


@pytest.mark.parametrize(("name", "width"), SEEN)
def test_nothing_is_wider_than_the_window_and_every_image_loads(seen, name, width):
    found = seen[f"{name} {width}"]
    assert found["width"] == width
    assert found["wide"] == [] and found["pageWidth"] <= width
    assert found["broken"] == found["blank"] == found["unresolved"] == 0
    assert found["images"] >= found["stored"] >= RUNS[name][1]


@pytest.mark.parametrize("name", PRINTED)
def test_no_table_is_cut_in_print_and_the_settings_are_last(seen, name):
    found = seen[f"{name} print"]
    assert found["wide"] == [] and found["pageWidth"] <= PAPER
    assert found["last"] == "settings"
    assert found["runs"] == 2  # all: nothing can be chosen on paper


@pytest.mark.parametrize("width", WIDTHS)
def test_an_image_opens_large_above_the_page_and_one_at_a_time(seen, width):
    found = seen[f"ten {width}"]
    assert found["small"] == [pytest.approx(32, abs=1)] * 2
    assert found["open"] == [width, 900]
    assert found["large"] >= min(0.9 * width - 16, 400)
    assert not found["bothOpen"] and found["focusable"]


@pytest.mark.parametrize("width", WIDTHS)
def test_one_run_is_chosen_and_its_confusion_is_beside_that_of_real(seen, width):
    found = seen[f"ten {width}"]
    assert found["runs"] == 1 and found["maps"] == 2
    assert found["mapsCut"] == 0


def test_the_browser_logs_no_error(pages, tmp_path):
    """The page itself, with its policy."""
    picture = tmp_path / "page.png"
    flags = ["--enable-logging=stderr", "--v=0", "--window-size=820,1200"]
    _, logged = browse(tmp_path, pages["ten"], f"--screenshot={picture}", *flags)
    assert [line for line in logged.splitlines() if "CONSOLE" in line] == []
    assert picture.stat().st_size > 10_000
