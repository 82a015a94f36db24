"""Classifiers that classify only images unrelated to their training data.

The real training images are split into folds. A synthetic image is classified by a
model fitted without the folds of its source and partners, and exact duplicates and the
images of a group (`config.data.group`) are in one fold, so the model has seen nothing
that the image was made from.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mvc_jax.data.order import generator
from mvc_jax.metrics.distances import Points

_MAX_COMPONENTS = 128  # principal components, input of the classifier
_C = 100.0  # inverse regularisation; highest likelihood on digits


class FoldClassifiers:
    """Logistic regressions on principal components, one for each set of folds left out.

    Each is fitted when it is first needed. If an image is related to m of k folds, the
    other k - m are used: with k = 5 and one partner at least 3/5 of the images.

    Args:
      points: the real training images.
      groups: int [N], equal for images that must be in one fold.
      labels: int [N], 0 to K - 1, each at least once.
      ids: of the images.
      folds: k.
      seed: of the split.
    """

    def __init__(
        self,
        points: Points,
        groups: Int[np.ndarray, " N"],
        labels: Int[np.ndarray, " N"],
        ids: tuple[str, ...],
        *,
        folds: int,
        seed: int,
    ):
        self._points, self._labels = points, labels
        self._folds = assign_folds(groups, labels, folds=folds, seed=seed)
        self._fold_of = dict(zip(ids, self._folds.tolist(), strict=True))
        self._fitted: dict[frozenset[int], tuple[Any, float]] = {}

    def probabilities(
        self, points: Points, related: Iterable[Iterable[str]]
    ) -> Float[np.ndarray, "M K"]:
        """Returns class probabilities of M images.

        Args:
          points: the images.
          related: for each, ids of the real images that it was made from.
        """
        import threadpoolctl

        found = []
        # The rounding of a matrix product depends on threads and batch: one of each.
        # These matrices are too small to profit from more.
        with threadpoolctl.threadpool_limits(1):
            for level, ids in zip(points.levels, related, strict=True):
                model, unit = self._model(frozenset(self._fold_of[id_] for id_ in ids))
                found.append(model.predict_proba(level[None] / unit)[0])
        return np.asarray(found).reshape(len(points), int(self._labels.max()) + 1)

    def _model(self, excluded: frozenset[int]) -> tuple[Any, float]:
        """Returns the model fitted without these folds, and the scale of its input."""
        if excluded not in self._fitted:
            used = ~np.isin(self._folds, list(excluded))
            levels, labels = self._points.levels[used], self._labels[used]
            # One scale for all features: constant pixels are not amplified.
            unit = float(np.sqrt(levels.var(0).sum())) or 1.0
            self._fitted[excluded] = _fit(levels / unit, labels), unit
        return self._fitted[excluded]


def assign_folds(
    groups: Int[np.ndarray, " N"],
    labels: Int[np.ndarray, " N"],
    *,
    folds: int,
    seed: int,
) -> Int[np.ndarray, " N"]:
    """Returns the fold of each image: stratified by class, groups kept together.

    Args:
      groups: equal for images that must be in one fold.
      labels: 0 to K - 1, each at least once.
      folds: k, at least 2.
      seed: of the shuffles, one for each class.
    """
    firsts, group = np.unique(groups, return_index=True, return_inverse=True)[1:]
    fold_of, assigned = np.empty(len(firsts), np.int64), 0
    for k in np.unique(labels):
        mine = np.flatnonzero(labels[firsts] == k)
        mine = generator(seed, "folds", int(k)).permutation(mine)
        fold_of[mine] = (assigned + np.arange(len(mine))) % folds
        assigned += len(mine)
    return fold_of[group]


def joined(
    copies: Int[np.ndarray, " N"], names: Sequence[str] | None
) -> Int[np.ndarray, " N"]:
    """Groups of images that are connected by being duplicates or of one named group.

    Args:
      copies: equal for exact duplicates.
      names: of the named group of each image; None: there are none.
    """
    if names is None:
        return copies
    from scipy import sparse

    named = np.unique(names, return_inverse=True)[1] + copies.max() + 1
    size = int(named.max()) + 1
    graph = sparse.coo_array((np.ones(len(named)), (copies, named)), (size, size))
    return sparse.csgraph.connected_components(graph, directed=False)[1][copies]


def _fit(x: Float[np.ndarray, "N P"], labels: Int[np.ndarray, " N"]) -> Any:
    from sklearn import decomposition, linear_model, pipeline

    return pipeline.make_pipeline(
        decomposition.PCA(min(_MAX_COMPONENTS, *x.shape), random_state=0),
        linear_model.LogisticRegression(C=_C, max_iter=1000),
    ).fit(x, labels)
