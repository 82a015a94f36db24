"""The commands, links and configs of the documents are valid."""

import re
import types

import numpy as np
import pytest
from documented import DOCUMENTS, ROOT, commands, train_flags

from mvc_jax import caption
from mvc_jax.checkpoints import diffusers_layout
from mvc_jax.command import command_line, pipeline, run_config
from mvc_jax.configs import common, digits
from mvc_jax.errors import UserError


@pytest.mark.parametrize(
    "words", list(commands()), ids=lambda words: " ".join(words)[:60]
)
def test_commands_in_the_documents_name_files_and_fields(words, tmp_path, monkeypatch):
    """`test_pipeline` also runs those that need no network and no GPU."""
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    run_config.write(digits.get_config(), tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    for word in words:
        if word.startswith("--from=runs/"):  # an earlier command's workdir
            (tmp_path / word.removeprefix("--from=")).mkdir(exist_ok=True)
    scripts = [word for word in words if word.endswith((".sh", ".py"))]
    for word in scripts:
        assert (ROOT / word.split("=")[-1].split(":")[0]).exists(), word
    flags = train_flags(words)
    if flags is not None and "--help" not in words:
        if not any(word.startswith("--workdir") for word in flags):
            flags.append("--workdir=runs/digits")
        # Their configs would be read from buckets.
        local = re.compile(r"^(--workdir|--from)=(gs|s3)://[^/]+")
        flags = [local.sub(r"\1=runs", flag) for flag in flags]
        config = command_line.parse(["train", *flags]).config
        assert pipeline.select(config)
    else:
        assert not any(word.startswith("--config.") for word in words)


def test_links_in_the_documents():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), (path.name, target)


class Everything:
    """A source with many classes and a test part, in place of the real datasets."""

    def __init__(self, classes=200, each=20):
        self.class_names = tuple(f"class {k}" for k in range(classes))
        self.labels = np.repeat(np.arange(classes, dtype=np.int32), each)
        self.ids = tuple(map(str, range(len(self.labels))))
        self.is_test = np.arange(len(self.labels)) % 20 < 5
        self.defects, self.remarks = {}, ()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        raise AssertionError("a check must not open an image")


CONFIGS = sorted(
    path
    for path in ROOT.glob("configs/[a-z]*.py")
    if "def get_config" in path.read_text("utf-8")
)
ARGUMENTS = {
    "folder": ":path=/data/parts",
    "cifar10": ":per_class=10",
    "brain_tumor_small": ":path=/data/scans,base=/data/objects",
    "real_images": ":data=brain_tumor,path=/data/scans",
}
WITHOUT_BASE = ("digits", "digits_splits", "brain_tumor_small", "cifar10_small")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_passes_its_own_checks(
    path, tmp_path, tiny, monkeypatch
):
    argument = ARGUMENTS.get(path.stem, "")
    config = run_config.load(f"{path}{argument}")
    if path.stem == "common":
        return
    ours = path.stem in WITHOUT_BASE
    if not config.data.source.startswith(
        "digits"
    ):  # these want a dataset, networks and their weights
        opened = []
        monkeypatch.setattr(
            caption,
            "open_source",
            lambda name, *_, **__: (
                opened.append(name) or (Everything(4, 20_000) if ours else Everything())
            ),
        )
        checked = []
        network = types.SimpleNamespace(DTYPES=["auto"], check_model=checked.append)
        monkeypatch.setattr(caption, "_network", lambda name: network)
        if not ours:
            diffusers_layout.save(tmp_path, *tiny)
            config.base.path = str(tmp_path)
    common.FIELDS.check(config)
    for name in pipeline.select(config):
        pipeline.module(name).check(config)
    if not config.data.source.startswith("digits"):
        assert re.match(r"(tfds:|folder:|parquet:)\w*", opened[0])
        assert len(checked) == (config.caption.captioner == "blip2")
        assert "Supplement" in path.read_text() or path.stem in (
            "folder",
            "tiny_imagenet",
            "cifar100",
            "real_images",
            *WITHOUT_BASE,
        )


@pytest.mark.parametrize(
    ("config", "argument", "wrong"),
    [
        ("cifar10", "per_class=abc", "per_class=abc"),
        ("cifar10", "per_class=-1", "per_class=-1"),
        ("cifar10", "per_class=5.0,preset=fast", "per_class=5.0"),
        ("cifar10", "per_class", "per_class"),
        ("cifar10", "50", "50"),
        ("cifar100", "per_class=5,pesret=fast", "pesret=fast"),
        ("caltech101", "preset=slow", "preset=slow"),
        ("caltech101", "per_class=5,", ""),
        ("brain_tumor", "path=/a,model=resnet18,preset=fast", "model=resnet18"),
        ("tiny_imagenet", "per_class=1,per_class=2", "per_class=2"),
        ("folder", "path=/a,size=abc,class_type=x, y", "size=abc"),
        ("folder", "path=/a,size=0", "size=0"),
        ("folder", "size=64", "size=64"),
        ("folder", "path=/a,pool=many", "pool=many"),
        ("folder", "path=/a,size=", "size="),
        ("digits", "ablation=1", "ablation=1"),
        ("digits", "Ablation,preset=fast", "Ablation"),
        ("digits", "fast", "fast"),
        ("brain_tumor", "path=/a,pretrain=small128", "pretrain=small128"),
        ("cifar10_small", "per_class=0", "per_class=0"),
        ("real_images", "data=digits,path=/a", "data=digits"),
        ("digits", "ablation,preset=slow", "preset=slow"),
        ("common", "per_class=5", "per_class=5"),
    ],
)
def test_a_wrong_argument_is_named_and_the_proposed_one_works(config, argument, wrong):
    with pytest.raises(UserError) as error:
        run_config.load(f"configs/{config}.py:{argument}")
    message = str(error.value)
    assert message.startswith("--config=FILE:ARGUMENT: wanted ")
    assert f", got {wrong!r}. " in message
    if config == "common":
        assert message.endswith("Leave out the colon and what follows it.")
    else:
        proposed = re.search("Write e.g. (.*) after the colon", message)[1]
        run_config.load(f"configs/{config}.py:{proposed}")


def test_a_folder_with_a_pool_trains_a_base_of_its_own():
    config = run_config.load("configs/folder.py:path=/a,pool=2000,class_type=part")
    assert (config.data.pool, config.base.path, config.data.size) == (2000, "", 32)
    common.FIELDS.check(config)
    stages = pipeline.select(config)
    assert "pretrain" in stages
    for name in {*stages} - {"caption"}:  # which opens the folder
        pipeline.module(name).check(config)
    plain = run_config.load("configs/folder.py:path=/a,pool=0")
    assert plain == run_config.load("configs/folder.py:path=/a")


def test_names_of_a_user_s_own_config():
    known = ("colours", "preset")
    given = common.parse_argument("colours=red,blue,preset=fast", known=known)
    assert given == {"colours": "red,blue", "preset": "fast"}
    with pytest.raises(UserError, match="colours=VALUE, preset=NAME, got 'colour=red'"):
        common.parse_argument("colour=red", known=known)


def test_the_ablation_and_a_preset_of_the_digits_combine():
    both, ablation, fast = (
        run_config.load(f"configs/digits.py:{argument}").to_dict()
        for argument in ("ablation,preset=fast", "ablation", "preset=fast")
    )
    figures = {"conditioning": "all", "coarse_fine": 10}
    assert both["generate"] == fast["generate"] | figures
    assert both | {"generate": ablation["generate"]} == ablation


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("path=/a,b=1/c", {"path": "/a,b=1/c"}),
        ("path=/a b,size=64,class_type=x y", None),
        ("size=64,path=/a", {"size": "64", "path": "/a"}),
        ("", UserError),
        ("/data/parts", UserError),
        ("path=", UserError),
        ("size=64", UserError),
    ],
)
def test_arguments_of_configs(argument, wanted):
    known = ("path", "class_type", "size")
    if wanted is UserError:
        with pytest.raises(UserError, match="path=/data/parts"):
            common.parse_argument(argument, known=known, needed=("path",))
    else:
        wanted = wanted or {"path": "/a b", "size": "64", "class_type": "x y"}
        given = common.parse_argument(argument, known=known, needed=("path",))
        assert given == wanted
