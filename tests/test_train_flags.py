"""The command line: every mistake is one sentence, and changes nothing."""

import errno
import inspect
import os
import pathlib
import re

import made_stages
import pytest

from mvc_jax import generate, train
from mvc_jax.command import command_line, pipeline, run_config, run_folder
from mvc_jax.configs import common, digits
from mvc_jax.errors import UserError
from mvc_jax.training import runtime

DIGITS = inspect.getsourcefile(digits)


@pytest.fixture
def started(monkeypatch):
    """Records (stage, config) instead of running the stage."""
    calls = []

    def record(name, config, workdir, priced, *, taken):
        calls.append((name, config))
        return True

    monkeypatch.setattr(train, "run_stage", record)
    monkeypatch.setattr(runtime, "set_up", lambda folder: None)
    return calls


@pytest.fixture
def workdir(tmp_path):
    """A run's folder with some files."""
    folder = tmp_path / "run"
    (folder / "caption").mkdir(parents=True)
    (folder / "caption" / "splits.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    return folder


def content(folder):
    """Every path below a folder -> (bytes, modification time) if it is a file."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }


def failure(capsys, *arguments):
    """Runs a command that must fail with one line; returns the line."""
    assert train.main(["train", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    [line] = printed.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# A flag, the start of the message, and words that follow in it.
MISTAKES = [
    ("--config.stages=nope", "config.stages", "'nope'", "caption,pretrain,encode"),
    ("--config.stages=", "config.stages", "''", "all, or some of"),
    ("--config.stages=all,mix", "config.stages", "'all'"),
    ("--config.stages=caption,mxi", "config.stages", "got 'mxi'"),
    ("--config.nope=1", "config.nope", "base, caption, classify", "seed, stages"),
    ("--config.nope.size=1", "config.nope", "base, caption"),
    ("--config.data.sise=1", "config.data.sise", "per_class, pool, prompt"),
    ("--config.data.size.x=1", "config.data.size.x", "it has none"),
    ("--noconfig.generate.nope", "config.generate.nope", "folder, format"),
    ("--config.=1", "config.", "base, caption"),
    ("--config.seed=abc", "config.seed", "a whole number from 0", "'abc'"),
    ("--config.seed=1.5", "config.seed", "whole number", "'1.5'"),
    ("--config.seed=", "config.seed", "got ''"),
    ("--config.seed", "--config.seed", "got no value"),
    ("--config.generate.text_scale=high", "config.generate.text_scale", "'high'"),
    ("--config.generate.folder=maybe", "config.generate.folder", "False", "maybe"),
    ("--config.data=3", "config.data", "classes, dir", "got 3"),
    ("--noconfig.seed", "--noconfig.seed", "--config.seed=0"),
    ("--nope=1", "command line", "'nope'"),
    ("junk", "command line", "'junk'", "equals sign"),
    ("--config.generate.sets=nope", "config.generate.sets", "mixed, unmixed", "'nope'"),
    ("--config.generate.sets=", "config.classify.runs", "config.generate.sets ()"),
    ("--config.generate.sets=(mixed,)", "config.generate.sets", "(mixed,)"),
    ("--config.generate.sets=('mixed'", "config.generate.sets", "('mixed'"),
    ("--config.generate.sets=(1)", "config.generate.sets", "(1)"),
    ("--config.generate.sets=mixed", "config.classify.runs", "('mixed',)", "unmixed"),
    ("--config.generate.sampler=pndm", "config.generate.sampler", "dpmpp_2m", "'pndm'"),
    ("--config.generate.guidance_rescale=2", "config.generate.guidance_rescale", "2.0"),
    (
        "--config.generate.guidance_interval=0.8,0.2",
        "config.generate.guidance_i",
        "0.8",
    ),
    ("--config.generate.guidance_interval=0.5", "config.generate.guidance_i", "(0.5,)"),
    (
        "--config.generate.guidance_interval=0.0,1.5",
        "config.generate.guidance_i",
        "1.5",
    ),
    ("--config.pretrain.vae.channels=", "config.pretrain.vae.channels"),
    ("--config.pretrain.vae.channels=('a',)", "config.pretrain.vae.channels", "'a'"),
    ("--config.pretrain.vae.channels=8,12", "config.pretrain.vae.channels", "(8, 12)"),
    ("--config.pretrain.vae.groups=0", "config.pretrain.vae.groups", "0"),
    ("--config.classify.runs=nope", "config.classify.runs", "probabilistic", "'nope'"),
    ("--config.classify.runs=real:mixed", "config.classify.runs", "takes no set"),
    ("--config.classify.runs=combined:real", "config.classify.runs", "only proba"),
    ("--config.classify.runs=combined+nope", "config.classify.runs", "affine, cutout"),
    ("--config.classify.runs=combined:nope", "config.classify.runs", "generate.sets"),
    ("--config.classify.runs=real,real", "config.classify.runs", "no run twice"),
    ("--config.classify.model=nope", "config.classify.model", "resnet8", "'nope'"),
    ("--config.classify.runs=real+", "config.classify.runs", "randaugment", "'real+'"),
    ("--config.classify.runs=real+flip+affine", "config.classify.runs", "at most one"),
    ("--config.classify.runs=real+mixup+cutmix", "config.classify.runs", "at most one"),
    ("--config.classify.runs=real+flip,real+flip+none", "config.classify.runs"),
    ("--config.classify.phase_two=2", "config.classify.phase_two", "0 to 1", "2.0"),
    ("--config.classify.probability=1.5", "config.classify.probability", "0 to 1"),
    ("--config.classify.ratio=7", "config.classify.ratio", "per_image=6", "got 7"),
    ("--config.classify.size=17", "config.classify.size", "config.data.size=16"),
    ("--config.classify.size=7", "config.classify.size", "at least 8 pixels", "got 7"),
    ("--config.classify.model=wrn40_2", "config.classify.width", "no width", "got 8"),
    ("--config.classify.stem=x", "config.classify.stem", "cifar or imagenet", "'x'"),
    (
        "--config.classify.optimizer=x",
        "config.classify.optimizer",
        "adam or sgd",
        "'x'",
    ),
    ("--config.classify.dtype=float16", "config.classify.dtype", "bfloat16"),
    ("--config.classify.patience=5", "config.classify.patience", "validation above 0"),
    ("--config.classify.validation=1", "config.classify.validation", "0.9", "got 1.0"),
    ("--config.classify.milestones=0.5,0.2", "config.classify.milestones", "ascending"),
    ("--config.classify.pretrained=./nope", "config.classify.pretrained", "nothing"),
    ("--config.mix.modes=coarse,nope", "config.mix.modes", "fine", "'nope'"),
    ("--config.mix.positions=nope", "config.mix.positions", "first or span or all"),
    ("--config.mix.partner=nope", "config.mix.partner", "class or any", "'nope'"),
    ("--config.mix.dims_on=nope", "config.mix.dims_on", "all or words", "'nope'"),
    ("--config.mix.per_image=0", "config.mix.per_image", "from 1", "got 0"),
    ("--config.mix.partners=0", "config.mix.partners", "from 1", "got 0"),
    ("--config.mix.tokens=-1", "config.mix.tokens", "from 0", "got -1"),
    ("--config.mix.tokens=16", "config.mix.tokens", "fewer than the 16", "got 16"),
    ("--config.mix.tokens_most=3", "config.mix.tokens_most", "tokens = 4", "got 3"),
    ("--config.mix.dims=-1", "config.mix.dims", "from 0", "-1"),
    ("--config.mix.dims=65", "config.mix.dims", "at most the 64 dims", "got 65"),
    ("--config.mix.file=nope.jsonl", "nope.jsonl", "a file of recipes", "no such"),
    ("--config.generate.text_scale=-1", "config.generate.text_scale", "from 0"),
    ("--config.generate.text_scale=nan", "config.generate.text_scale", "got nan"),
    ("--config.generate.image_scale_most=1", "config.generate.image_scale_most", "1.5"),
    ("--config.generate.sets=mixed,mixed", "config.generate.sets", "each once"),
    ("--config.generate.steps=0", "config.generate.steps", "from 1 to 999", "got 0"),
    ("--config.generate.steps=1000", "config.generate.steps", "1 to 999", "got 1000"),
    ("--config.generate.sampler=x", "config.generate.sampler", "dpmpp_2m", "'x'"),
    ("--config.generate.format=gif", "config.generate.format", "png or jpeg", "'gif'"),
    ("--config.generate.size=-2", "config.generate.size", "from -1", "got -2"),
    ("--config.generate.max_redraws=-1", "config.generate.max_redraws", "got -1"),
    ("--config.generate.limit=-1", "config.generate.limit", "from 0", "got -1"),
    ("--config.generate.dtype=int8", "config.generate.dtype", "float32", "'int8'"),
    ("--config.generate.attention=x", "config.generate.attention", "cudnn", "'x'"),
    ("--config.generate.interpolation=2", "config.generate.interpolation", "0 to 1"),
    (
        "--config.generate.filter.nope=1",
        "config.generate.filter.nope",
        "copies, copies",
    ),
    ("--config.generate.filter.label=x", "config.generate.filter.label", "folds or"),
    ("--config.generate.filter.label=clip", "config.generate.filter.label", "a CLIP"),
    ("--config.generate.filter.copies=x", "config.generate.filter.copies", "source"),
    (
        "--config.generate.filter.outliers_quantile=1.5",
        "config.generate.filter.outliers_quantile",
        "from 0 to 1",
        "got 1.5",
    ),
    ("--config.generate.noise_scale=-1", "config.generate.noise_scale", "got -1"),
    ("--config.generate.guidance_rescale=2", "config.generate.guidance_rescale", "2.0"),
    (
        "--config.generate.guidance_interval=(0.5,0.5)",
        "config.generate.guidance_interval",
    ),
    ("--config.pairs.rounds=0", "config.pairs.rounds", "from 1", "got 0"),
    ("--config.encode.batch_size=0", "config.encode.batch_size", "from 1"),
    (
        "--config.finetune.drop_rate=0.5",
        "config.finetune.drop_rate",
        "0 to 0.333",
        "0.5",
    ),
    ("--config.evaluate.confidence=1", "config.evaluate.confidence", "0 and 1"),
    ("--config.report.grid_scale=9", "config.report.grid_scale", "16 to 256", "got 9"),
    ("--config.caption.captioner=x", "config.caption.captioner", "attributes", "'x'"),
    ("--config.data.source=nope", "config.data.source", "digits", "'nope'"),
    ("--config.data.size=18", "config.data.size", "multiple of 4", "got 18"),
    ("--config.data.pool=0", "config.data.pool", "got 0", "config.base.path"),
    ("--config.data.pool=9999", "class 'zero'", "pool", "lower config.data.pool"),
    ("--config.data.per_class=999", "config.data.per_class", "'zero'", "999", "Lower"),
    ("--config.data.per_class=0", "config.data.test_fraction", "above 0", "got 0"),
    ("--config.data.per_class=-1", "config.data.per_class", "from 0", "got -1"),
    ("--config.data.window=-inf,inf", "config.data.window", "two finite", "inf,inf"),
    ("--config.data.max_pixels=1", "config.data.max_pixels", "from 1,024", "got 1"),
    ("--config.data.pool=1e20", "config.data.pool", "whole number", "'1e20'"),
    ("--config.data.classes=one,one", "config.data.classes", "each once"),
    ("--config.mesh={}", "config.mesh", "data, fsdp", "got {}"),
    ("--config.mesh.data=0", "config.mesh.data", "-1, or a whole number", "got 0"),
    ("--config.finetune=3", "config.finetune", "accumulate", "got 3"),
    ("--config.generate.guidance_interval=(0.2,'0.8')", "config.generate.guid", "0.8'"),
    ("--config.classify.milestones=(0.5,'x')", "config.classify.milestones", "'x'"),
    ("--config.classify.milestones=0.5,x", "config.classify.milestones", "0.5,x"),
    ("--config.classify.runs=(1,2)", "config.classify.runs", "got (1, 2)"),
    ("--config.classify.warmup=251", "config.classify.warmup", "steps=250, got 251"),
    ("--config.finetune.warmup=301", "config.finetune.warmup", "steps=300, got 301"),
    ("--config.pretrain.unet.warmup=1501", "config.pretrain.unet.warmup", "steps=1500"),
    ("--config.pretrain.unet.warmup=-1", "config.pretrain.unet.warmup", "got -1"),
    ("--config.pretrain.unet.heads=7", "config.pretrain.unet.heads", "width 64"),
    ("--config.pretrain.text.heads=7", "config.pretrain.text.heads", "width 64"),
    ("--config.pretrain.image_encoder.heads=7", "config.pretrain.image_en", "heads=7"),
    ("--config.pretrain.unet.ema_decay=2", "config.pretrain.unet.ema_decay", "below 1"),
    ("--config.pretrain.unet.drop_rate=2", "config.pretrain.unet.drop_rate", "0 to 1"),
    ("--config.pretrain.vae.kl_weight=-1", "config.pretrain.vae.kl_weight", "from 0"),
    ("--config.seed=4294967296", "config.seed", "to 4,294,967,295", "got 4294967296"),
    ("--config.seed=9223372036854775808", "config.seed", "got 9223372036854775808"),
    ("--config.seed=-1", "config.seed", "-1"),
    ("--config.min_free_disk_gib=1e9", "--workdir=", "min_free_disk_gib", "Free some"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[0])
def test_a_mistake_is_one_sentence_and_changes_nothing(
    mistake, started, workdir, capsys
):
    flag, start, *words = mistake
    before = content(workdir.parent)
    line = failure(capsys, f"--config={DIGITS}", f"--workdir={workdir}", flag)
    assert line.startswith(start)
    for word in words:
        assert word in line
    assert content(workdir.parent) == before
    assert started == []


@pytest.mark.parametrize("flag", [(), ("--workdir=",), ("--workdir",)])
def test_a_workdir_must_be_named(flag, started, capsys):
    assert "--workdir" in failure(capsys, f"--config={DIGITS}", *flag)


@pytest.mark.parametrize("path", ["notes.txt", "notes.txt/run", "locked"])
def test_a_workdir_must_be_writable(path, started, workdir, capsys, monkeypatch):
    if path == "locked":
        (workdir / "locked").mkdir()

        def denied(path, content):  # by hand: nothing is read-only to root
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(run_folder.files, "write_text", denied)
    before = content(workdir)
    line = failure(capsys, f"--config={DIGITS}", f"--workdir={workdir / path}")
    assert line.startswith(f"--workdir={workdir / path}: wanted a folder that can be")
    assert content(workdir) == before


def test_a_new_workdir_is_made_but_stays_empty(started, tmp_path, capsys):
    new = tmp_path / "a" / "b"
    failure(capsys, f"--config={DIGITS}", f"--workdir={new}", "--config.mix.dims=65")
    assert list(content(tmp_path)) == [tmp_path / "a", new]


CONFIGS = {  # text of the file: a word of the message
    "def get_config(:": "SyntaxError",
    "import nothing_of_this_name": "ModuleNotFoundError",
    "config = 1": "get_config",
    "def get_config(): raise ValueError('one\\ntwo')": "ValueError",
    "def get_config(needed): pass": "needed",
    "def get_config(): return {'seed': 1}": "ConfigDict",
    "def get_config(): pass": "ConfigDict",
    "import ml_collections as m\ndef get_config(): return m.ConfigDict()": "stages",
}


@pytest.mark.parametrize("text", CONFIGS, ids=CONFIGS.values())
def test_an_invalid_config_is_named(text, started, workdir, capsys):
    path = workdir / "mine.py"
    path.write_text(text)
    line = failure(capsys, f"--config={path}", f"--workdir={workdir}")
    assert str(path) in line
    assert CONFIGS[text] in line


@pytest.mark.parametrize("path", ["nope.py", "configs/nope.py", "run", "run/notes.txt"])
def test_a_config_must_be_a_python_file(path, workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir.parent)
    line = failure(capsys, f"--config={path}", f"--workdir={workdir}")
    assert line.startswith(f"--config={path}: wanted a Python file with get_config()")
    assert ("a folder" in line) == (path == "run")


@pytest.mark.parametrize("path", ["configs/digits.py", "./configs/digits.py"])
@pytest.mark.parametrize("inside", [True, False], ids=["checkout", "elsewhere"])
def test_a_shipped_config_is_found_from_anywhere(path, inside, tmp_path, monkeypatch):
    checkout = os.path.dirname(os.path.dirname(DIGITS))
    monkeypatch.chdir(checkout if inside else tmp_path)
    assert run_config.load(path).to_dict() == digits.get_config().to_dict()


@pytest.mark.parametrize(
    ("argument", "title"), [("", "none"), (":", "none"), (":a=b:c", "a=b:c")]
)
def test_text_after_the_colon_is_passed_to_get_config(argument, title, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from mvc_jax.configs import common\n"
        "def get_config(title='none'):\n"
        "    config = common.get_config()\n"
        "    config.report.title = title\n"
        "    return config\n"
    )
    config = run_config.load(f"{tmp_path / 'mine.py'}{argument}")
    assert config.report.title == title


def config_of(*flags):
    words = ["train", f"--config={DIGITS}", "--workdir=w", *flags]
    return command_line.parse(words).config


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--config.generate.sets=mixed"], "generate.sets", ("mixed",)),
        (["--config.generate.sets=a, b"], "generate.sets", ("a", "b")),
        (["--config.generate.sets=('mixed',)"], "generate.sets", ("mixed",)),
        (["--config.generate.sets=['a','b']"], "generate.sets", ("a", "b")),
        (["--config.pretrain.vae.channels=8"], "pretrain.vae.channels", (8,)),
        (["--config.pretrain.vae.channels=8,16"], "pretrain.vae.channels", (8, 16)),
        (["--config.pretrain.vae.channels=(8, 16)"], "pretrain.vae.channels", (8, 16)),
        (["--config.seed=7"], "seed", 7),
        (["--config.seed", "7"], "seed", 7),
        (["-config.seed=7"], "seed", 7),
        (["--config.seed=6", "--config.seed=7"], "seed", 7),
        (
            ["--config.generate.sets=mixed", "--config.generate.sets=unmixed"],
            "generate.sets",
            ("unmixed",),
        ),
        (["--config.classify.milestones="], "classify.milestones", ()),
        (
            ["--config.generate.guidance_interval=0,1"],
            "generate.guidance_interval",
            (0.0, 1.0),
        ),
        (["--config.generate.text_scale=2"], "generate.text_scale", 2.0),
        (["--config.finetune.learning_rate=1e-5"], "finetune.learning_rate", 1e-5),
        (["--config.generate.folder=false"], "generate.folder", False),
        (["--noconfig.generate.folder"], "generate.folder", False),
        (["--config.generate.folder"], "generate.folder", True),
        (["--config.data.class_type=a photo, b=c"], "data.class_type", "a photo, b=c"),
        (["--config.base.path="], "base.path", ""),
    ],
)
def test_an_override_has_the_type_of_its_field_and_changes_no_other(
    flags, field, value
):
    config, expected = config_of(*flags), digits.get_config()
    expected.update_from_flattened_dict({field: value})
    assert config.to_dict() == expected.to_dict()
    found = config
    for part in field.split("."):
        found = found[part]
    assert type(found) is type(value)


def test_a_preset_says_what_it_changes(caplog):
    with caplog.at_level("INFO", "absl"):
        both = run_config.load("configs/digits.py:preset=quality+lowmem16")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "preset quality: finetune.ema_decay=0.999, generate.filter.label=folds, "
        "generate.filter.outliers=True, generate.steps=100",
        "preset lowmem16: finetune.mode=lora, finetune.remat=blocks, "
        "generate.batch_size=8",
        "flags, as --config.generate.steps=30, override what a preset sets",
    ]
    common.FIELDS.check(both)
    assert (both.finetune.mode, both.generate.steps) == ("lora", 100)


@pytest.mark.parametrize("steps", [12, 50])
def test_the_fast_preset_never_raises_the_number_of_steps(steps, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from mvc_jax.configs import common\n"
        "def get_config(argument=''):\n"
        "    config = common.get_config()\n"
        f"    config.generate.steps = {steps}\n"
        "    given = common.parse_argument(argument, known=('preset',))\n"
        "    return common.apply_preset(config, given)\n"
    )
    plain, fast = (run_config.load(f"{path}{x}") for x in ("", ":preset=fast"))
    changed = {"sampler": "dpmpp_2m", "steps": min(20, steps)}
    changed["guidance_interval"] = (0.2, 0.8)
    assert fast.generate.to_dict() == plain.generate.to_dict() | changed
    assert fast.finetune.to_dict() == plain.finetune.to_dict()
    for argument, message in {
        ":preset=slow": "preset=fast or quality or .*, got 'preset=slow'",
        ":preset=fast+slow": "got 'preset=fast.slow'",
        ":slow": "preset=",
    }.items():
        with pytest.raises(UserError, match=message):
            run_config.load(f"{path}{argument}")


@pytest.mark.parametrize(
    "path",
    ["digits.py:", "cifar10.py:", "cifar100.py:", "caltech101.py:", "brain_tumor.py:"]
    + ["tiny_imagenet.py:path=a,b,", "folder.py:path=a,"],
)
def test_every_config_has_the_fast_preset(path):
    config = run_config.load(f"configs/{path}preset=fast")
    assert config.generate.sampler == "dpmpp_2m"
    assert config.data.source != "folder:a,preset=fast"


def test_tiny_imagenet_has_the_classifiers_of_cifar_at_64_pixels():
    tiny, cifar = (
        run_config.load(f"configs/{n}.py") for n in ("tiny_imagenet", "cifar10")
    )
    assert tiny.classify.to_dict() == cifar.classify.to_dict() | {"size": 64}
    assert tiny.data.size == cifar.data.size == 256


def test_a_field_cannot_be_added_later():
    with pytest.raises((AttributeError, KeyError)):
        run_config.load(DIGITS).data.sise = 3


@pytest.mark.parametrize(
    ("names", "path", "stages"),
    [
        ("all", "", list(train.STAGES)),
        ("all", "sd15", [name for name in train.STAGES if name != "pretrain"]),
        ("report, mix,caption", "", ["caption", "mix", "report"]),
        ("mix,mix,", "", ["mix"]),
        ("pretrain", "sd15", ["pretrain"]),
    ],
)
def test_stages_run_in_the_order_of_the_pipeline(names, path, stages):
    config = common.get_config()
    config.stages, config.base.path = names, path
    assert pipeline.select(config) == stages


def test_a_mesh_that_does_not_fit_the_devices_is_refused_before_captioning(
    started, workdir, capsys
):
    """There are 8; another process counts them, so this one starts no backend."""
    command = [f"--config={DIGITS}", f"--workdir={workdir}", "--config.mesh.fsdp=3"]
    line = failure(capsys, *command)
    assert line.startswith("config.mesh: wanted data * fsdp = 8 devices, got data=-1")
    assert started == []
    made_stages.finish(workdir, digits.get_config(), "caption", "pretrain", "encode")
    prepare = "--config.stages=caption,pairs"  # may run on another machine
    assert train.main(["train", *command, prepare]) == 0
    (workdir / "encode" / "manifest.json").unlink()
    fitting = [flag.replace("fsdp=3", "fsdp=4") for flag in command]
    assert train.main(["train", *fitting, "--config.stages=encode"]) == 0
    assert [name for name, _ in started] == ["caption", "pairs", "encode"]


def test_stages_that_use_the_mesh_are_known():
    folder = pathlib.Path(train.__file__).parent
    using = [
        name
        for name in train.STAGES
        if re.search(r"make_mesh\(|local_mesh\(", (folder / f"{name}.py").read_text())
    ]
    assert list(pipeline.MESH_STAGES) == using


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--version", ["mvc_jax 0."]),
        ("--help", ["--config=configs/digits.py --workdir=runs/digits", "--version"]),
        ("--help", ["  75   stopped by SIGTERM", "  finetune ", "--config.seed=0"]),
        ("-h", ["Exit codes"]),
        (
            "--help=finetune",
            ["--config.finetune.steps=1000", "[full or lora]", "rank="],
        ),
        ("--help=generate.filter", ["--config.generate.filter.label_top=1\n"]),
        ("--help=config.seed", ["--config.seed=0\n", "4,294,967,295]"]),
    ],
)
def test_help_and_version_print_and_exit(flag, words, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["train", "--config=nope.py", flag])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for word in words:
        assert word in printed


def test_help_names_every_stage_and_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        train.main(["train", "--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in train.STAGES)
    assert "base, caption, classify" in failure(capsys, "--help=nope")


@pytest.mark.parametrize("flag", ["--config.finetune=3", "--config.mesh={}"])
def test_a_section_is_refused_after_another_override_too(flag, started, capsys):
    for flags in (["--config.finetune.steps=5", flag], [flag, "--config.mesh.data=1"]):
        line = failure(capsys, f"--config={DIGITS}", "--workdir=w", *flags)
        assert "wanted a section of the fields" in line


def test_a_field_of_a_config_that_is_not_declared_is_refused(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from mvc_jax.configs import common\n"
        "def get_config():\n"
        "    config = common.get_config()\n"
        "    config.data.sise = 16\n"
        "    return config\n"
    )
    line = failure(capsys, f"--config={path}", f"--workdir={tmp_path}")
    assert line.startswith("config.data.sise: wanted a field of config.data: class")


def test_a_good_command_runs_its_stages_with_its_config(started, workdir, capsys):
    flags = ["--config.stages=mix,pairs", "--config.seed=5"]
    made_stages.finish(workdir, config_of(*flags), "caption", "pretrain", "encode")
    command = ["train", f"--config={DIGITS}", f"--workdir={workdir}", *flags]
    assert train.main(command) == 0
    assert [name for name, _ in started] == ["pairs", "mix"]
    assert {config.seed for _, config in started} == {5}


def test_a_contact_sheet_ends_the_run(started, workdir, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(generate, "run", lambda config, workdir: drawn.append(workdir))
    flags = ["--config.stages=mix,generate,classify", "--config.generate.limit=3"]
    made_stages.finish(workdir, config_of(*flags), *train.STAGES[:5])
    command = ["train", f"--config={DIGITS}", f"--workdir={workdir}", *flags]
    assert train.main(command) == 0
    assert [name for name, _ in started] == ["mix"]
    assert len(drawn) == 1
    sheet = workdir / "generate" / "contact_sheet.png"
    assert capsys.readouterr().out == f"contact sheet: {sheet}\n"


@pytest.mark.parametrize(
    "flag", ["limit=-3", "batch_size=0", "dtype=float8", "guidance_interval=(0.5,)"]
)
def test_a_contact_sheet_of_a_finished_run_is_checked(started, workdir, capsys, flag):
    made_stages.finish(workdir, digits.get_config(), *train.STAGES)
    flags = ["--config.stages=generate", "--config.generate.limit=3"]
    flags.append(f"--config.generate.{flag}")
    command = ["train", f"--config={DIGITS}", f"--workdir={workdir}", *flags]
    assert train.main(command) == 2
    assert f"config.generate.{flag.partition('=')[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "rerun the same command"),
        (OSError(28, "No space left on device", "x.npy"), 2, "x.npy: wanted space"),
        (UserError("f", wanted="a", got="b", fix="C."), 2, "error: f: wanted a, got b"),
    ],
    ids=["interrupted", "disk full", "user error"],
)
def test_the_message_at_the_end_of_a_run(
    started, workdir, capsys, monkeypatch, raised, code, words
):
    def run_stage(*_, **__):
        raise raised

    monkeypatch.setattr(train, "run_stage", run_stage)
    assert train.main(["train", f"--config={DIGITS}", f"--workdir={workdir}"]) == code
    assert words in capsys.readouterr().err


def dry(workdir, tmp_path, *flags):
    cache = f"--config.compilation_cache={tmp_path / 'cache'}"
    command = ["train", f"--config={DIGITS}", f"--workdir={workdir}", cache, *flags]
    return train.main([*command, "--dry_run"])


@pytest.mark.parametrize("there", [True, False])
def test_a_dry_run_prints_every_stage_and_changes_nothing(
    there, workdir, tmp_path, capsys
):
    if there:
        (workdir / ".tmp-1-metrics.jsonl").write_text("half")
    before = content(tmp_path)
    folder = workdir if there else tmp_path / "new" / "run"
    assert dry(folder, tmp_path) == 0
    assert content(tmp_path) == before
    printed = capsys.readouterr()
    assert printed.err == ""
    first, *rows, blank, over, _, start, _, line = printed.out.splitlines()
    assert first.split() == ["stage", "makes", "disk,", "about", "memory", "time"]
    assert [row.split()[0] for row in rows] == list(train.STAGES)
    assert blank == "" and over.startswith("over: ")
    assert start.startswith("generate: samples start at timestep 999 of 0 to 999")
    assert line.startswith("10 of 10 stages to do; 1,800 synthetic images; 64,800 UNet")


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--config.classify.steps=1000000000", "stage classify: "),
        ("--config.stages=caption,finetune", "stage finetune: "),
    ],
)
def test_a_dry_run_of_what_is_refused_ends_with_the_error_of_the_run(
    flag, name, tmp_path, capsys, started
):
    assert dry(tmp_path / "new", tmp_path, flag) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("stage ")
    [line] = printed.err.splitlines()
    assert line.startswith(f"error: {name}")
    assert [*tmp_path.iterdir()] == []
    command = ["train", f"--config={DIGITS}", f"--workdir={tmp_path / 'new'}", flag]
    assert train.main(command) == 2
    assert capsys.readouterr().err.splitlines() == [line]
    assert started == []


def test_a_dry_run_does_not_delete_damaged_files(workdir, capsys):
    flags = [f"--config={DIGITS}", f"--workdir={workdir}", "--dry_run", "--verify"]
    assert failure(capsys, *flags).startswith("--dry_run: wanted one without --verify")


def test_a_run_says_what_it_takes_before_it_starts(started, workdir, capsys):
    flags = [f"--config={DIGITS}", f"--workdir={workdir}"]
    flags += ["--config.stages=caption,pretrain", "--config.compilation_cache="]
    assert train.main(["train", *flags]) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("2 of 2 stages to do; 2,300 optimiser steps; about 42.")
    assert line.endswith("none of these stages was run like this here")


def test_two_runs_cannot_use_a_workdir_at_once(started, workdir, capsys, monkeypatch):
    """The second would delete the temporary files of the first."""
    flags = [f"--config={DIGITS}", f"--workdir={workdir}"]
    command = [*flags, "--config.stages=caption,pretrain"]
    temporary = workdir / ".tmp-1-metrics.jsonl"
    messages = []

    def run_stage(*_, **__):
        temporary.write_text("half")
        capsys.readouterr()  # the price of the first
        messages.append(failure(capsys, *command))
        return temporary.exists()

    monkeypatch.setattr(train, "run_stage", run_stage)
    assert train.main(["train", *command]) == 0
    assert messages == 2 * [
        f"--workdir={workdir}: wanted a folder that no other run is using, got one in "
        "use by another process. Wait until it has ended, or choose another folder."
    ]
    assert temporary.exists()
    capsys.readouterr()
    monkeypatch.setattr(train, "run_stage", lambda *_, **__: not temporary.exists())
    assert train.main(["train", *command]) == 0  # unlocked, and deleted


def test_a_bug_keeps_its_traceback(started, workdir, monkeypatch):
    monkeypatch.setattr(train, "run_stage", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(["train", f"--config={DIGITS}", f"--workdir={workdir}"])


@pytest.mark.parametrize("usable", [True, False])
def test_a_compilation_cache_that_cannot_be_written_is_a_warning(
    usable, tmp_path, monkeypatch, caplog
):
    options = {}
    monkeypatch.setattr(runtime, "_set_jax", options.__setitem__)
    for name in (
        "keep_freed_memory",
        "schedule_depth_first",
        "enlarge_compiler_stacks",
    ):
        monkeypatch.setattr(runtime, f"_{name}", lambda: None)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / ("new" if usable else "file") / "xla"
    runtime.set_up(str(folder))
    assert ("compilation_cache_dir" in options) == usable
    assert (f"config.compilation_cache={folder} cannot" in caplog.text) == (not usable)
    assert not usable or list(folder.iterdir()) == []
