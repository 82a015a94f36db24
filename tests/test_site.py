"""The documentation site builds without a warning, whole, and loads nothing else."""

import ast
import html
import importlib
import re
import subprocess
import sys

import pytest
from documented import ROOT
from test_api import PUBLIC

from mvc_jax.configs import common

FAQ = re.findall(r"^### `(.+)`$", (ROOT / "docs/faq.md").read_text("utf-8"), re.M)
_ANY = "\0"  # what is not known before the program runs


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {p.name: p.read_text("utf-8") for p in folder.glob("*.html")}


def test_pages_load_nothing_from_a_network(site):
    loads = r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(https?:)?//[^>]*"
    for name, page in site.items():
        assert not re.search(loads, page), name


def test_every_document_is_a_page_and_the_readme_the_first(site):
    names = {f"{path.stem}.html" for path in ROOT.glob("docs/*.md")}
    made = {"index.html", "results.html", "benchmarks.html", "quickstart.html"}
    made |= {"config.html", "configs.html", "contributing.html"}
    assert names | made <= {*site}
    assert 'href="benchmarks.html' in site["index.html"] + site["scaling.html"]
    assert "digits.png" in site["index.html"]
    assert 'href="config.html' in site["index.html"]


def test_every_field_has_a_row(site):
    page = site["config.html"]
    for name, field in common.FIELDS.flat().items():
        row = re.search(rf'<span id="{re.escape(name)}">.*?</tr>', page, re.S)[0]
        text = html.unescape(re.sub("<[^>]*>", "", row))
        assert field.wanted in text, name
        assert field.help.replace("`", "") in text, name


def test_everything_public_is_described(site):
    for module, names in PUBLIC.items():
        for name in names:
            if module.__name__ != "mvc_jax" or name == "run":
                assert f'id="{module.__name__}.{name}"' in site["python.html"], name
            else:
                importlib.import_module(f"mvc_jax.{name}")


def test_the_comparison_names_tests_that_exist():
    page = (ROOT / "docs/comparison.md").read_text("utf-8")
    files = re.findall(r"`(tests/test_\w+\.py)`", page)
    functions = re.findall(r"`(test_\w+)`", page)
    assert len(files) > 8
    assert all((ROOT / name).exists() for name in files)
    tests = "".join(path.read_text("utf-8") for path in ROOT.glob("tests/test_*.py"))
    assert functions
    assert all(f"\ndef {name}(" in tests for name in functions)


def texts_of_errors():
    """Every `UserError` of the code as a text, with `_ANY` for what varies."""

    def text(node):
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return _ANY

    for path in [*ROOT.glob("mvc_jax/**/*.py"), *ROOT.glob("configs/*.py")]:
        source = path.read_text("utf-8")
        for node in ast.walk(ast.parse(source)) if "UserError(" in source else ():
            calls = isinstance(node, ast.Call) and node.args and node.keywords
            if calls and getattr(node.func, "id", "") == "UserError":
                parts = {part.arg: text(part.value) for part in node.keywords}
                if {"wanted", "got", "fix"} <= {*parts}:
                    told = f"wanted {parts['wanted']}, got {parts['got']}"
                    yield f"{text(node.args[0])}: {told}. {parts['fix']}"
    # `Tree.error` and `_too_few` complete what is given to them.
    for path in ROOT.glob("mvc_jax/data/*.py"):
        for found in re.findall(r'\bwanted ?= ?"([^"]+)"', path.read_text("utf-8")):
            yield f"{_ANY}: wanted {found}, got {_ANY}"


def test_quoted_messages_are_those_of_the_code():
    assert 10 <= len(FAQ) == len({*FAQ})
    known = [*texts_of_errors()]
    for quoted in FAQ:
        pieces = [re.escape(piece) for piece in quoted.split("...")]
        # Where the text varies, any part of a message may stand.
        pattern = ".*".join(pieces)
        assert any(re.search(pattern, message, re.S) for message in known), quoted
