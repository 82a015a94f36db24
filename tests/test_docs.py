"""What the documents tell a reader to type is what the program takes."""

import pathlib
import re
import shlex

import pytest

from mvc_jax import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]


def commands():
    for path in DOCUMENTS:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", path.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield pytest.param(words, id=" ".join(words)[:60])


@pytest.mark.parametrize("words", list(commands()))
def test_commands_in_the_documents(words):
    scripts = [word for word in words if word.endswith((".sh", ".py"))]
    for word in scripts:
        assert (ROOT / word.split("=")[-1].split(":")[0]).exists(), word
    flags = [word for word in words if word.startswith("--config.")]
    runs = "mvc_jax.train" in words or "mvc-jax" in words or "launch/demo.sh" in words
    if runs and "--help" not in words:
        given = [word for word in words if word.startswith("--")]
        if not any(word.startswith("--workdir") for word in given):
            given.append("--workdir=runs/digits")
        config, _ = train.parse_flags(["train", *given])
        assert train.select_stages(config)
    else:
        assert not flags


def test_links_in_the_documents():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), (path.name, target)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/[a-z]*.py")), ids=lambda p: p.stem
)
def test_every_config_loads_and_passes_its_own_checks(path, tmp_path):
    config, _ = train.parse_flags(
        ["train", f"--config={path}", f"--workdir={tmp_path}"]
    )
    if path.stem != "common":
        for name in train.select_stages(config):
            train._stage(name).check(config)
