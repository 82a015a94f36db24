"""Pages of the site that are made of other files, and links that fit the site.

A hook of MkDocs (`hooks` in mkdocs.yml).
"""

import ast
import html
import json
import pathlib
import posixpath
import re
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mvc_jax.configs import common
from mvc_jax.configs.fields import Field, Section, as_flag

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIES = {  # a file of the repository -> its page
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
}
NOTEBOOK = "docs/quickstart.ipynb"
PLACES = COPIES | {
    "configs": "configs.md",
    "configs/common.py": "config.md",
    NOTEBOOK: "quickstart.md",
}
_FENCED = re.compile(r"^(```.*?^```)", re.M | re.S)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds pages of docs/ that the navigation does not name, at its end."""
    named = {*re.findall(r"[\w-]+\.md", str(config.nav))}
    others = sorted(p.name for p in ROOT.glob("docs/*.md") if p.name not in named)
    if others:
        config.nav.append({"More": others})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    pages = {page: (ROOT / path).read_text("utf-8") for path, page in COPIES.items()}
    made = {"config.md": _fields, "configs.md": _configs, "quickstart.md": _notebook}
    pages |= {name: "\n".join(lines()) for name, lines in made.items()}
    pages["index.md"] = f"---\nhide: [navigation]\n---\n{pages['index.md']}"
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Points links at the site's pages; what the site has not becomes a code span."""
    name = page.file.src_uri
    origins = {page: path for path, page in COPIES.items()}
    folder = posixpath.dirname(origins.get(name, f"docs/{name}"))

    def fitted(match: re.Match) -> str:
        image, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or "://" in path:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, path))
        place = PLACES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(place) and place != path:
            return f"{image}[{text}]({place}{hash_}{anchor})"
        same = text.strip("`") in (path, target)
        return f"`{path}`" if same else f"{text} (`{path}`)"

    parts = _FENCED.split(markdown)
    parts[::2] = [_LINK.sub(fitted, part) for part in parts[::2]]
    return "".join(parts)


def _fields() -> Iterator[str]:
    """Lines of the reference of all fields."""
    yield (
        "# Fields\n\nEvery field of the config, made from the declarations in "
        "`configs/common.py`, from which the checks and `--help=SECTION` are made, "
        "too. A field is a flag, `--config.FIELD=VALUE`; the items of a list are "
        "separated by commas. A shipped config sets some of them "
        "([configs](configs.md)); any other name or value is an error that says what "
        "is allowed.\n"
    )
    yield "## Of no section\n"
    own = {k: f for k, f in common.FIELDS.fields.items() if isinstance(f, Field)}
    yield from _table(own, "")
    for name, part in common.FIELDS.fields.items():
        if isinstance(part, Section):
            yield from _section(part, name, "##")


def _section(section: Section, name: str, level: str) -> Iterator[str]:
    yield f"{level} {name}\n\n{_sentence(section.help)}\n"
    fields = {k: f for k, f in section.fields.items() if isinstance(f, Field)}
    yield from _table(fields, f"{name}.")
    for key, part in section.fields.items():
        if isinstance(part, Section):
            yield from _section(part, f"{name}.{key}", f"{level}#")


def _table(fields: dict[str, Field], prefix: str) -> Iterator[str]:
    yield "| field | default | what it may be | what it is |\n|---|---|---|---|"
    for key, field in fields.items():
        name, default = prefix + key, as_flag(field.default)
        shown = f"`{default}`" if default else "empty"
        place = f'<span id="{name}"></span>`{name}`'
        cells = place, shown, _escaped(field.wanted), _escaped(field.help)
        yield f"| {' | '.join(cells)} |"
    yield ""


def _configs() -> Iterator[str]:
    """Lines of the page of all config files: their docstrings."""
    yield (
        "# Shipped configs\n\nA config is a Python file, "
        "`--config=configs/NAME.py:ARGUMENT`. These are the notes at the head of each: "
        "the command, what the source says, and what was measured.\n"
    )
    for path in sorted(ROOT.glob("configs/*.py")):
        source = path.read_text("utf-8")
        if "def get_config" in source and path.stem != "common":
            about = ast.get_docstring(ast.parse(source)) or ""
            about = re.sub(r"(?<=\S) {2,}", " ", about)  # of continued lines
            yield f"## {path.name}\n\n{about}\n"


def _notebook() -> Iterator[str]:
    """Lines of the notebook with its outputs."""
    for cell in json.loads((ROOT / NOTEBOOK).read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        yield f"```python\n{source}\n```\n" if cell["cell_type"] == "code" else source
        yield ""
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                pixels = "".join("".join(data["image/png"]).split())
                yield f'<img alt="output" src="data:image/png;base64,{pixels}">\n'
            elif text := "".join(data["text/plain"]).rstrip():
                yield f"```text\n{text}\n```\n"


def _escaped(text: str) -> str:
    """A text as it is, but for its code spans."""
    parts = re.split("(`[^`]*`)", text)
    outside = (html.escape(part, quote=False) for part in parts[::2])
    parts[::2] = [re.sub(r"([\[\]*|])", r"\\\1", part) for part in outside]
    return "".join(parts)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
