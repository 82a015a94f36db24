"""The settings of the filters, and what can be checked before an image is drawn."""

import dataclasses

from etils import epath

from mvc_jax.errors import UserError

FIELD = "config.generate.filter"
CLIP_FIELD = "config.generate.clip"
FILTERS = ("label", "copies", "outliers")


@dataclasses.dataclass(frozen=True)
class FilterSettings:
    """The section `generate.filter`. By default nothing is removed.

    Attributes:
      label: removes images in which the label is not recognised. "folds": by a
        classifier trained on real images other than the image's source and partners;
        "clip": by zero-shot classification with CLIP; "": off.
      label_folds: number of cross-validation folds of "folds".
      label_threshold: minimum probability of the label, in [0, 1].
      label_top: an image is also kept if its label is among this many most probable
        classes; 0: only `label_threshold` counts.
      copies: removes near-copies of real training images. "any": of any of them;
        "source": of the image's own source only; "": off.
      copies_quantile: an image closer than this quantile of the distances from each
        real image to the nearest different one is a copy, in [0, 1]; 0: the minimum.
      outliers: removes images far from all real images of their class.
      outliers_quantile: an image farther from the nearest real image of its class than
        this quantile of the real images' own distances is an outlier, in [0, 1].
      features: input of `outliers` and of the classifiers of "folds": "pixels", "clip"
        (image embeddings), or "auto" ("clip" if a CLIP is available).
    """

    label: str = ""
    label_folds: int = 5
    label_threshold: float = 0.5
    label_top: int = 1
    copies: str = ""
    copies_quantile: float = 0.0
    outliers: bool = False
    outliers_quantile: float = 0.99
    features: str = "auto"

    @property
    def enabled(self) -> bool:
        """Whether any filter is on."""
        return bool(self.label or self.copies or self.outliers)

    @property
    def use_embeddings(self) -> bool:
        """Whether CLIP's image embeddings are used if a CLIP is available."""
        by_features = self.label == "folds" or self.outliers
        return self.label == "clip" or (by_features and self.features != "pixels")

    def require_clip(self, available: bool) -> None:
        """Raises a `UserError` if a field is "clip" and no CLIP is `available`."""
        names = [
            name for name in ("label", "features") if getattr(self, name) == "clip"
        ]
        if names and not available:
            raise UserError(
                f"{FIELD}.{' and '.join(names)}",
                wanted="another value, or a CLIP checkpoint",
                got=f"'clip', but {CLIP_FIELD} is empty and the base model has no "
                "image_encoder",
                fix=f"Name a CLIP checkpoint by {CLIP_FIELD}.",
            )

    def require_top(self, classes: int) -> None:
        """Raises a `UserError` if every label is among the most probable ones."""
        if self.label and self.label_top > classes:
            raise UserError(
                f"{FIELD}.label_top",
                wanted=f"at most {classes}, the number of classes",
                got=f"{self.label_top}",
                fix="Lower it; the default is 1.",
            )

    def require_folds(self, partners: int) -> None:
        """Raises a `UserError` if no fold would be left to train on.

        Args:
          partners: maximum number of partners of an image.
        """
        if self.label == "folds" and self.label_folds < partners + 2:
            raise UserError(
                f"{FIELD}.label_folds",
                wanted=f"at least {partners + 2}: training leaves out the folds of an "
                f"image's source and of its {partners} partners, and needs one more",
                got=f"{self.label_folds}",
                fix="Raise it.",
            )


def check_filters(
    settings: FilterSettings,
    *,
    partners: int,
    clip_path: str,
    base_path: str,
    pretrain_image_encoder: bool,
) -> None:
    """Checks the settings, and the configuration files of a CLIP that is needed.

    Args:
      settings: to be checked.
      partners: maximum number of partners of an image, besides its source.
      clip_path: folder or hub name of a CLIP; "": the base model's image encoder.
      base_path: folder or hub name of the base model; "": `pretrain` trains one.
      pretrain_image_encoder: whether `pretrain` would train an image encoder.

    Raises:
      UserError: there are too few folds, or a CLIP is missing or unusable.
    """
    settings.require_folds(partners)
    names_clip = "clip" in (settings.label, settings.features)
    if not names_clip and not settings.use_embeddings:
        return
    available = bool(clip_path) or (
        may_have_image_encoder(base_path) if base_path else pretrain_image_encoder
    )
    settings.require_clip(available)
    if not settings.use_embeddings or not available:
        return
    by_text = settings.label == "clip"
    if by_text and not (clip_path or base_path):
        raise UserError(
            f"{FIELD}.label",
            wanted="a CLIP with a text encoder, to classify images by text",
            got="'clip', and only the image encoder that pretrain makes",
            fix=f"Name a complete CLIPModel by {CLIP_FIELD}, or set "
            f"--{FIELD}.label=folds.",
        )
    if clip_path or base_path:
        # Here, because they import JAX.
        from mvc_jax.checkpoints import clip_checkpoint, pipeline_folder

        if not clip_path and pipeline_folder.is_hub_name(base_path):
            return  # `encode` checks the base; its encoder is known after the download
        clip_checkpoint.check(clip_path or base_path, field=CLIP_FIELD, text=by_text)


def may_have_image_encoder(base_path: str) -> bool:
    """Whether a base model has an image encoder; true of a name on the hub."""
    from mvc_jax.checkpoints import pipeline_folder

    if pipeline_folder.is_hub_name(base_path):
        return True
    return has_image_encoder(epath.Path(base_path))


def has_image_encoder(base: epath.Path) -> bool:
    """Whether a local pipeline folder contains CLIP's image encoder."""
    from mvc_jax.checkpoints import clip_checkpoint

    folder = base.expanduser() / clip_checkpoint.IMAGE_ENCODER
    return (folder / "config.json").exists()
