"""Real images alone: the supplement's classifiers as a table of baselines.

    mvc-jax repeat --seeds=0,1,2 --workdir=runs/real_mri \
      --config=configs/real_images.py:data=brain_tumor,path=data/brain-tumor-mri
    mvc-jax repeat --seeds=0,1,2 --workdir=runs/real_caltech101 \
      --config=configs/real_images.py:data=caltech101,path=data/caltech101

The classifiers' recipes are those of `brain_tumor.py` (`model=` chooses another of its
networks) and `caltech101.py`, at 224 pixels; there is no synthetic image, so that only
`caption`, `classify`, `evaluate` and `report` run. It is sized for a GPU, where nothing
was measured; `per_class=25` and `--config.classify.epochs=10` make it smaller.

At 64 pixels (`--config.data.size=64 --config.classify.size=64
--config.classify.seeds=1`), 100 scans a class, three splits: ResNet-50 72.2 % with
flips and crops, 25 minutes a split on one core; EfficientNet-B0 71.3 %, 10 minutes.
`docs/results.md` has all, and Caltech-101.
"""

from ml_collections import ConfigDict

from mvc_jax.configs import brain_tumor, caltech101, common

DATA = ("brain_tumor", "caltech101")
POLICIES = ("flip_crop", "randaugment", "autoaugment_imagenet", "trivialaugment")


def get_config(argument: str = "") -> ConfigDict:
    """The config for `data=NAME,path=FOLDER[,model=NAME][,per_class=COUNT]`.

    Raises:
      UserError: the argument has another form.
    """
    known = ("data", "path", "model", "per_class")
    given = common.parse_argument(argument, known=known, needed=("data", "path"))
    if common.choice(given, "data", DATA) == "brain_tumor":
        model = f",model={given['model']}" if "model" in given else ""
        config = brain_tumor.get_config(f"path={given['path']}{model}")
    else:
        config = caltech101.get_config()
        config.data.source = f"folder:{given['path']}"
        config.data.duplicates = "remove"
    config.data.per_class = common.whole_number(given, "per_class", 0)
    config.data.size = config.classify.size
    config.caption.captioner = "template"
    config.generate.sets = ()
    config.classify.runs = ("real", *(f"real+{policy}" for policy in POLICIES))
    config.classify.seeds = 3
    config.report.title = f"Real images alone: {given['data']}"
    return config
