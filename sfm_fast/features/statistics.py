"""Class statistics of real features: counts, means, optional covariance and k-means centres, computed in one pass in float64."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import check_labels, kind_of
from ..errors import InputError, require_package
from ..files import Metadata, load_tensors, save_tensors
from ..schema import BACKBONE, NAMES, check
from ..settings import PROXIMITY, SHRINKAGE
from .discriminant import discriminant_centers
from .regression import regression_centers
from .scatter import Scatter

FORMAT = "sfm_fast.statistics/1"
LARGEST = 1e140  # of features for a covariance
_METADATA = {
    "class_names?": (NAMES, None),
    "provenance?": {
        "backbone?": BACKBONE,
        "channels?": lambda value: type(value) is int and value in (1, 3),
        "data?": str,
        "images?": int,
        "fingerprint?": str,
        "split?": str,
    },
}


class ClassStatistics:
    """Mean feature of each class, independent of the order of images, the batch size and the number of processes.

    Args:
        num_classes: C >= 2.
        dim: D, features per image.
        clusters: K, k-means centres per class besides its mean (scikit-learn's MiniBatchKMeans); 0 for none. A class of fewer than K
            images has its images as centres, repeated, and a warning says so; at least one class must have K images.
        covariance: whether to compute the pooled within-class covariance too, which `discriminant_centers` needs: 2*D*D operations
            per image and a (D, D) float64 matrix of memory (4.7 MB for D = 768), saved as float32.
        class_names: C names, used in error messages.
        device: of the (C, D) float64 sums; features are moved there.

    Sums are float64: relative to the feature scale, the centres are exact to about 1e-15 times the number of images.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        clusters: int = 0,
        covariance: bool = False,
        class_names: list[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_classes < 2:
            raise InputError(f"num_classes must be at least 2 (a flow needs another class), got {num_classes}")
        if dim < 1:
            raise InputError(f"dim must be at least 1, got {dim}")
        if clusters < 0:
            raise InputError(f"clusters must be at least 0, got {clusters}")
        if not isinstance(covariance, bool):
            raise InputError(f"covariance must be True or False, got {covariance!r}")
        if class_names is not None and len(class_names) != num_classes:
            raise InputError(f"class_names has {len(class_names)} names for {num_classes} classes")
        self.num_classes, self.dim, self.clusters = num_classes, dim, clusters
        self.class_names = class_names
        self.provenance: Metadata = {}
        self.where = "statistics"  # their name in messages, such as their file
        # Tensors made in inference mode couldn't be updated outside of it.
        with torch.inference_mode(False):
            self._sums = torch.zeros(num_classes, dim, dtype=torch.float64, device=device)
            self._counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
            self._scatter = Scatter(dim, device) if covariance else None
        # The covariance divided by its mean variance, float32, and that variance, float64: computed from the scatter at the first use.
        self._within: tuple[Tensor, Tensor] | None = None
        self._cluster_centers: Tensor | None = None
        self._fits = _ClusterFits(num_classes, clusters) if clusters else None

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: features (N, D) of any float dtype, labels (N,) int64. If an argument is bad, nothing is added."""
        if self.clusters and self._fits is None:
            raise InputError("statistics with k-means centres can't be updated after loading them from a file")
        for name, tensor in (("features", features), ("labels", labels)):
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                raise InputError(f"{name} must be a tensor that holds values, got {kind_of(tensor)}")
        if features.ndim != 2 or not features.is_floating_point() or features.shape[1] != self.dim:
            raise InputError(
                f"features must be (items, {self.dim}) floats, got {tuple(features.shape)} {features.dtype}"
            )
        labels = labels.to(self._counts.device)
        counts = check_labels("labels", labels, features.shape[0], self.num_classes)
        features = features.detach().to(self._sums.device, torch.float64)
        finite = features.isfinite().all(1)
        if not finite.all():
            row = int((~finite).nonzero()[0, 0])
            raise InputError(
                f"features: row {row} of the batch (class {self._name(int(labels[row]))}) holds NaN or infinity"
            )
        if self._scatter is not None and len(features) and (largest := float(features.abs().max())) > LARGEST:
            raise InputError(
                f"features must be at most {LARGEST:g} for a covariance, whose squares overflow otherwise, got {largest:.3g}"
            )
        self._sums.index_add_(0, labels, features)
        self._counts += counts
        if self._scatter is not None:
            self._scatter.update(features)
            self._within = None
        if self._fits is not None:
            self._fits.update(features, labels)
            self._cluster_centers = None

    def merge(self, other: ClassStatistics) -> None:
        """Add the sums and counts of ``other``; k-means centres can't be merged, so neither may have any."""
        if not isinstance(other, ClassStatistics):
            raise InputError(f"other must be ClassStatistics, got {kind_of(other)}")
        if (other.num_classes, other.dim) != (self.num_classes, self.dim):
            raise InputError(
                f"other must have {self.num_classes} classes x {self.dim} features, got {other.num_classes} x {other.dim}"
            )
        if self.class_names and other.class_names and self.class_names != other.class_names:
            raise InputError(f"other must have the classes {self.class_names[:5]}…, got {other.class_names[:5]}…")
        if self.clusters or other.clusters:
            raise InputError("statistics with k-means centres can't be merged: compute them in one pass")
        if (self._scatter is None) != (other._scatter is None):
            having = ["a covariance" if one._scatter is not None else "none" for one in (self, other)]
            raise InputError(
                f"other must have a covariance if these statistics do: these have {having[0]}, other {having[1]}"
            )
        sums, counts = other._sums.to(self._sums.device), other._counts.to(self._counts.device)
        if self._scatter is not None and other._scatter is not None and other._scatter.point is not None:
            point = other._scatter.point.to(self._sums.device)
            self._scatter.move(point, self._sums.sum(0), self._counts.sum())
            self._scatter.matrix += other._scatter.matrix.to(self._sums.device)
            self._within = None
        self._sums += sums
        self._counts += counts

    def all_reduce(self, group: Any = None) -> None:
        """Sum over the ranks of a torch.distributed group, in place on every rank."""
        if self.clusters:
            raise InputError("statistics with k-means centres can't be reduced over ranks: compute them in one process")
        if self._scatter is not None:
            total, count = self._sums.sum(0), self._counts.sum()
            mean, images = total.clone(), count.clone()
            torch.distributed.all_reduce(mean, group=group)
            torch.distributed.all_reduce(images, group=group)
            self._scatter.move(mean / images.clamp(min=1), total, count)  # every rank about the same point
            torch.distributed.all_reduce(self._scatter.matrix, group=group)
            self._within = None
        torch.distributed.all_reduce(self._sums, group=group)
        torch.distributed.all_reduce(self._counts, group=group)

    @property
    def counts(self) -> Tensor:
        """(C,) int64, number of images of each class."""
        return self._counts.clone()

    @property
    def centers(self) -> Tensor:
        """(C, D) float64 class means. Raises ``InputError`` if a class has no images."""
        empty = (self._counts == 0).nonzero().flatten()
        if len(empty):
            raise InputError(
                f"class {self._name(int(empty[0]))} has no images ({len(empty)} of {self.num_classes} classes are empty)"
            )
        return self._sums / self._counts.unsqueeze(1)

    @property
    def cluster_centers(self) -> Tensor | None:
        """(C, K, D) float64 k-means centres, or None if ``clusters`` is 0."""
        if self._fits is not None and self._cluster_centers is None:
            self.centers  # noqa: B018 (raises if a class is empty, before k-means would)
            self._cluster_centers = self._fits.finish(self._name)
        return self._cluster_centers

    @property
    def within_covariance(self) -> Tensor | None:
        """(D, D) float64, symmetric: the pooled within-class covariance S_w, the mean over images of (x - mu_c)(x - mu_c)^T; None without ``covariance``.

        Its entries have the precision of float32 relative to the mean variance, as in the file.
        """
        within = self._unit_covariance()
        return None if within is None else within[0].double() * within[1]

    def _unit_covariance(self) -> tuple[Tensor, Tensor] | None:
        if self._scatter is not None and self._within is None:
            self.centers  # noqa: B018 (raises if a class is empty)
            exact = self._scatter.within(self._sums, self._counts)
            variance = exact.diagonal().mean()
            # Relative to the mean variance, because the squares of small or large features don't fit into float32.
            self._within = (exact / torch.where(variance > 0, variance, 1)).float(), variance
        return self._within

    def discriminant_centers(self, *, shrinkage: float | str = "auto", scale: float | str = "auto") -> Tensor:
        """(C, D) float64 discriminant centres: targets whose nearest-target rule is the regularised linear discriminant of the real data.

        They can take the place of ``centers`` in any loss. shrinkage: lambda > 0 (or 0 if the covariance is regular), in units of the
        mean variance. scale: kappa > 0, the targets' distance from the common mean in units of the class means' distance. "auto":
        chosen from the statistics. Formulas and rules: `sfm_fast.features.discriminant`.
        Raises ``InputError`` without ``covariance``, for an empty class, and for values out of range.
        """
        within = self._needed_covariance("discriminant")
        return discriminant_centers(self.centers, within, shrinkage=shrinkage, scale=scale)

    def regression_centers(
        self, start: Tensor | None = None, *, shrinkage: float = SHRINKAGE, proximity: float = PROXIMITY
    ) -> Tensor:
        """(C, D) float64 regression centres, or (C, K, D): targets on which ridge regression learns to predict the classes of the real data.

        They can take the place of ``centers``, or of ``cluster_centers``, in any loss. start: what they start from and stay near, (C, D) or
        (C, K, D), such as ``cluster_centers`` (None: ``centers``). shrinkage: lambda > 0 of the ridge regression, in units of the targets' mean
        squared distance from their mean. proximity: > 0, the weight of staying near. Formulas: `sfm_fast.features.regression`.
        Raises ``InputError`` without ``covariance``, for an empty class, for another shape and for values out of range.
        """
        within = self._needed_covariance("regression")
        return regression_centers(self.centers, within, start, shrinkage=shrinkage, proximity=proximity)

    def _needed_covariance(self, kind: str) -> Tensor:
        within = self.within_covariance
        if within is None:
            raise InputError(
                f"{self.where}: holds no covariance, which {kind} centres need: compute it with ClassStatistics(..., covariance=True) "
                "or `sfm-fast stats` without --no-covariance"
            )
        return within

    def save(self, path: str | os.PathLike[str], provenance: Metadata | None = None) -> None:
        """Write a safetensors file (atomically): sums, counts, centres, and ``provenance`` (default: its own) as metadata."""
        tensors = {"sums": self._sums, "counts": self._counts, "centers": self.centers}
        if self.cluster_centers is not None:
            tensors["cluster_centers"] = self.cluster_centers
        if (within := self._unit_covariance()) is not None:
            tensors["within_covariance"], tensors["within_variance"] = within
        save_tensors(
            path,
            tensors,
            {"file_format": FORMAT, "class_names": self.class_names, "provenance": provenance or self.provenance},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassStatistics:
        """Read a file of `save`; ``.provenance`` of the result holds its metadata. Raises ``InputError`` if the file is damaged."""
        tensors, metadata = load_tensors(path)
        if metadata.get("file_format") != FORMAT or not {"sums", "counts"} <= tensors.keys():
            raise InputError(
                f"{path}: no class statistics of this package (format must be {FORMAT!r}, got {metadata.get('file_format')!r})"
            )
        sums, counts = tensors["sums"], tensors["counts"]
        whole = sums.ndim == 2 and sums.dtype == torch.float64 and sums.isfinite().all()
        if not whole or counts.dtype != torch.int64 or counts.shape != sums.shape[:1] or (counts < 0).any():
            raise InputError(f"{path}: damaged statistics (sums {tuple(sums.shape)}, counts {tuple(counts.shape)})")
        check(path, metadata, _METADATA, "statistics")
        names, clusters = metadata.get("class_names"), tensors.get("cluster_centers")
        if names is not None and len(names) != len(sums):
            raise InputError(f"{path}: damaged statistics ({len(sums)} classes, class names {str(names)[:80]})")
        if clusters is not None:
            fits = clusters.ndim == 3 and clusters.shape[::2] == sums.shape and clusters.shape[1] > 0
            if not fits or clusters.dtype != torch.float64 or not clusters.isfinite().all():
                raise InputError(
                    f"{path}: damaged statistics (cluster_centers must be finite float64 ({sums.shape[0]}, centres, {sums.shape[1]}), "
                    f"got {tuple(clusters.shape)} {clusters.dtype})"
                )
        within, variance = tensors.get("within_covariance"), tensors.get("within_variance", torch.tensor(-1.0))
        if within is not None:
            fits = within.shape == (sums.shape[1],) * 2 and within.dtype == torch.float32
            fits = (
                fits and variance.shape == () and variance.dtype == torch.float64 and bool(0 <= variance < float("inf"))
            )
            if (
                not fits
                or not within.isfinite().all()
                or not torch.equal(within, within.T)
                or within.diagonal().min() < 0
            ):
                raise InputError(
                    f"{path}: damaged statistics (within_covariance must be symmetric finite float32 ({sums.shape[1]}, {sums.shape[1]}), with a "
                    f"float64 within_variance of at least 0, got {tuple(within.shape)} {within.dtype} and {variance.tolist()} {variance.dtype})"
                )
        statistics = cls(*sums.shape, class_names=names)
        statistics.where = str(path)
        with torch.inference_mode(False):  # as in the constructor
            statistics._sums, statistics._counts = sums.clone(), counts.clone()
        if clusters is not None:
            statistics.clusters, statistics._cluster_centers = clusters.shape[1], clusters
        if within is not None:
            statistics._within = within, variance
            with torch.inference_mode(False):
                exact = within.double().clone() * variance.clone()
                statistics._scatter = Scatter.from_within(exact, statistics._sums, statistics._counts)
        statistics.provenance = metadata.get("provenance", {})
        return statistics

    def _name(self, label: int) -> str:
        return f"{label} ({self.class_names[label]!r})" if self.class_names else str(label)


class _ClusterFits:
    """One mini-batch k-means per class, fed from a small buffer so that no second pass over the images is needed."""

    BUFFER = 1024

    def __init__(self, num_classes: int, clusters: int) -> None:
        require_package("sklearn", "k-means centres", "distill")
        from sklearn.cluster import MiniBatchKMeans

        self.clusters = clusters
        self.models = [MiniBatchKMeans(clusters, random_state=0, n_init=3) for _ in range(num_classes)]
        self.buffers: list[list[Tensor]] = [[] for _ in range(num_classes)]
        self.fitted = [False] * num_classes

    def update(self, features: Tensor, labels: Tensor) -> None:
        for label in labels.unique().tolist():
            buffer = self.buffers[label]
            buffer.append(features[labels == label].cpu())
            if sum(map(len, buffer)) >= max(self.BUFFER, self.clusters):
                self._fit(label)

    def _fit(self, label: int) -> None:
        self.models[label].partial_fit(torch.cat(self.buffers[label]).numpy())
        self.buffers[label], self.fitted[label] = [], True

    def finish(self, name: Any) -> Tensor:
        small: dict[int, Tensor] = {}
        for label, buffer in enumerate(self.buffers):
            rows = sum(map(len, buffer))
            if rows and (self.fitted[label] or rows >= self.clusters):
                self._fit(label)
            if not self.fitted[label]:
                small[label] = torch.cat(buffer)
        check_clusters({label: len(rows) for label, rows in small.items()}, len(self.models), self.clusters, name)
        repeated = torch.arange(self.clusters)
        return torch.stack(
            [
                small[label][repeated % len(small[label])]
                if label in small
                else torch.from_numpy(model.cluster_centers_)
                for label, model in enumerate(self.models)
            ]
        )


def check_clusters(small: Mapping[int, int], num_classes: int, clusters: int, name: Callable[[int], str]) -> None:
    """Warn about classes with fewer images than ``clusters``, ``small`` (class -> images); raise ``InputError`` if all are."""
    if not small:
        return
    listed = ", ".join(f"{name(label)} has {count}" for label, count in list(small.items())[:5])
    listed += f" and {len(small) - 5} more" if len(small) > 5 else ""
    if len(small) == num_classes:
        raise InputError(f"every class has too few images for {clusters} k-means centres (class {listed})")
    warnings.warn(
        f"classes with fewer images than {clusters} centres use their images as centres, repeated (class {listed})",
        RuntimeWarning,
        stacklevel=2,
    )
