"""Classifiers that are asked only about what they have not seen.

Training images are dealt into folds. An image made from some of them is put to a
classifier that was fitted on the folds that hold none of those: nothing it was made
from, nor any exact copy of that, has taught the one who judges it.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mvc_jax.data.order import generator
from mvc_jax.screening.distances import Points

_MOST_DIMS = 128  # principal components that the classifier sees
_STRENGTH = 100.0  # C of scikit-learn: of digits it gives the best likelihood


class Classifiers:
    """Logistic regressions on principal components, one for each set of folds left out.

    They are fitted when they are first asked for. Of m folds that an image touches,
    the other k - m are learnt from: with k = 5 and one partner at least 3/5 of all.

    Args:
      points: of the real training images.
      copies: int [N], equal where two images are exactly the same.
      labels: int [N], 0 to K - 1, each at least once.
      ids: of the images.
      folds: k.
      seed: of the dealing.
    """

    def __init__(
        self,
        points: Points,
        copies: Int[np.ndarray, " N"],
        labels: Int[np.ndarray, " N"],
        ids: tuple[str, ...],
        *,
        folds: int,
        seed: int,
    ):
        self._points, self._labels = points, labels
        self._folds = deal(copies, labels, folds=folds, seed=seed)
        self._fold_of = dict(zip(ids, self._folds.tolist(), strict=True))
        self._fitted: dict[frozenset[int], Any] = {}

    def probabilities(
        self, points: Points, made_from: Iterable[Iterable[str]]
    ) -> Float[np.ndarray, "M K"]:
        """Of each class for each of M images.

        Args:
          points: of the images.
          made_from: for each, ids of the real images that it was made from.
        """
        import threadpoolctl

        found = []
        # One thread and one image at a time: how a product of matrices is rounded
        # depends on both. These matrices are too small for more to help.
        with threadpoolctl.threadpool_limits(1):
            for level, ids in zip(points.levels, made_from, strict=True):
                model, unit = self._model(frozenset(self._fold_of[id_] for id_ in ids))
                found.append(model.predict_proba(level[None] / unit)[0])
        return np.asarray(found).reshape(len(points), int(self._labels.max()) + 1)

    def _model(self, excluded: frozenset[int]) -> tuple[Any, float]:
        """What was fitted without these folds, and the levels in its unit."""
        if excluded not in self._fitted:
            seen = ~np.isin(self._folds, list(excluded))
            levels, labels = self._points.levels[seen], self._labels[seen]
            # One unit for all: a pixel that hardly varies is not blown up.
            unit = float(np.sqrt(levels.var(0).sum())) or 1.0
            self._fitted[excluded] = _fit(levels / unit, labels), unit
        return self._fitted[excluded]


def deal(
    copies: Int[np.ndarray, " N"],
    labels: Int[np.ndarray, " N"],
    *,
    folds: int,
    seed: int,
) -> Int[np.ndarray, " N"]:
    """The fold of each image: every class is spread evenly, copies stay together.

    Args:
      copies: equal where two images are exactly the same.
      labels: 0 to K - 1, each at least once.
      folds: k, at least 2.
      seed: of the shuffles, one for each class.
    """
    firsts, group = np.unique(copies, return_index=True, return_inverse=True)[1:]
    fold_of, dealt = np.empty(len(firsts), np.int64), 0
    for k in np.unique(labels):
        mine = np.flatnonzero(labels[firsts] == k)
        mine = generator(seed, "folds", int(k)).permutation(mine)
        fold_of[mine] = (dealt + np.arange(len(mine))) % folds
        dealt += len(mine)
    return fold_of[group]


def _fit(x: Float[np.ndarray, "N P"], labels: Int[np.ndarray, " N"]) -> Any:
    from sklearn import decomposition, linear_model, pipeline

    return pipeline.make_pipeline(
        decomposition.PCA(min(_MOST_DIMS, *x.shape), random_state=0),
        linear_model.LogisticRegression(C=_STRENGTH, max_iter=1000),
    ).fit(x, labels)
