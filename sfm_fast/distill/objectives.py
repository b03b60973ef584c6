"""The distillation methods' losses, which a step minimises; `methods` declares their options and requirements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import philox
from ..backbones.backbone import Backbone
from ..data.sources import ImageSource
from ..data.transforms import ImageTransform
from ..errors import InputError
from ..losses.evaluate import Constants, Options, check_options, evaluate, prepare
from ..losses.module import FlowAlignmentLoss
from ..ops.augment import augment
from ..philox import Stream
from ..reference import gradient_matching
from ..views import draw_views
from .methods import LGM_VARIANTS as LGM_VARIANTS
from .methods import AnchoredFlow, DecoupledFlow, Flow, Matching, Method, declare

CLASSIFIER_STD = 0.01


@dataclass(frozen=True)
class Given:
    """Inputs for building an objective: the backbone, and the centres or real images that the method needs.

    channels: of the synthetic images. centers: (C, D), or (C, ipc, D) at cluster level; None for a method that needs none.
    mean: (D,), the mean of the real class means, which isn't that of discriminant centres; None if ``centers`` is. source: real
    images, or None.
    """

    backbone: Backbone
    num_classes: int
    channels: int
    centers: Tensor | None = None
    mean: Tensor | None = None
    source: ImageSource | None = None


class Objective(Method, ABC):
    """A loss on the features of the synthetic images, and what a run must know about it.

    `prepare` runs before the synthetic images of a step are rendered and may load real images; `loss` gets features (views * N, D) and
    labels (views * N,) int64, ordered by view. A method is a subclass decorated with `method`: everything else, from its options on the
    command line to the prediction of its memory, follows from its class attributes and those of `Method`.
    """

    # Whether it is a mean over classes (at cluster level: over images), each term of its own images' features only.
    separable: bool = False
    backbone_gradients: bool = (
        False  # whether the backbone's parameters get gradients too, as in the public code of LGM
    )
    views: int = 1  # augmented views per synthetic image and step

    @classmethod
    def trains_backbone(cls, config: Any) -> bool:
        """Whether the backbone's parameters get gradients too, as in the public code of LGM; then it runs as loaded, not prepared."""
        return False

    @classmethod
    @abstractmethod
    def build(cls, config: Any, given: Given) -> Objective:
        """The objective for a `DistillConfig`. Raises ``InputError`` if ``given`` lacks a needed input."""

    def prepare(self, step: int) -> None:
        """Compute what ``step`` needs before the synthetic images are rendered."""

    @abstractmethod
    def loss(self, features: Tensor, labels: Tensor, step: int) -> Tensor:
        """Scalar loss of ``step``. A separable one may also be asked for the images of some terms: the mean over these terms."""

    def terms(self, features: Tensor, labels: Tensor, step: int, chosen: range) -> Tensor:
        """The mean over the ``chosen`` terms of a separable loss, from their images' features, which are ordered by view, then by term."""
        return self.loss(features, labels, step)


METHODS: dict[str, type[Objective]] = {}


def method(kind: type[Objective]) -> type[Objective]:
    """Decorator: register a subclass of `Objective` as a method under its ``name``."""
    METHODS[kind.name] = kind
    declare(kind)
    return kind


@method
class FlowMatching(Flow, Objective):
    """SFM: align the flows between class means with those between the centres, which are loaded once.

    centers: (C, D), or (C, K, D) for cluster-level matching of image k of a class with the class's k-means centre k, without
    flows between centres of one class; only with alignment "pair".
    """

    def __init__(
        self,
        centers: Tensor,
        *,
        views: int = 1,
        alignment: str = "global",
        metric: str = "cosine",
        backend: str = "auto",
    ) -> None:
        self.views, self.clusters = views, centers.shape[1] if centers.ndim == 3 else 1
        groups = torch.arange(len(centers), device=centers.device).repeat_interleave(self.clusters)
        self.criterion = FlowAlignmentLoss(
            centers.reshape(-1, centers.shape[-1]),
            alignment=alignment,
            metric=metric,
            backend=backend,
            groups=groups if centers.ndim == 3 else None,
        )

    @classmethod
    def build(cls, config: Any, given: Given) -> FlowMatching:
        assert given.centers is not None
        return cls(given.centers, views=config.views_per_step, alignment=config.alignment, metric=config.metric)

    def loss(self, features: Tensor, labels: Tensor, step: int) -> Tensor:
        loss: Tensor = self.criterion(features, center_of(labels, self.clusters, self.views))
        return loss


class _PerCenter(Objective):
    """A loss with a term for each centre, which micro-batches of whole terms compute on their own.

    centers: (C, D), or (C, K, D) for cluster-level matching of image k of a class with the class's k-means centre k.
    """

    def __init__(self, centers: Tensor, constants: Constants, options: Options, views: int) -> None:
        self.views, self.clusters = views, centers.shape[1] if centers.ndim == 3 else 1
        self.constants, self.loss_options = constants, options
        self._labels: dict[
            tuple[int, int], Tensor
        ] = {}  # of the views of a number of terms; kept, because sorting labels takes time

    def loss(self, features: Tensor, labels: Tensor, step: int) -> Tensor:
        return evaluate(features, center_of(labels, self.clusters, self.views), self.constants, self.loss_options)

    def terms(self, features: Tensor, labels: Tensor, step: int, chosen: range) -> Tensor:
        count, rows = len(chosen), len(features)
        local = None
        if rows != count:  # else the features are the class means, in order
            if (count, rows) not in self._labels:
                first = torch.arange(count, device=features.device).repeat_interleave(rows // self.views // count)
                self._labels[count, rows] = first.repeat(self.views)
            local = self._labels[count, rows]
        return evaluate(features, local, self.constants.part(chosen.start, chosen.stop), self.loss_options)


@method
class DecoupledFlowMatching(DecoupledFlow, _PerCenter):
    """SFM's decoupled variant: mean squared error to the class's centre and to the mean of the other centres; see `decoupled_flow_loss`."""

    def __init__(self, centers: Tensor, *, views: int = 1, alpha: float = 1.0, backend: str = "auto") -> None:
        constants = prepare(centers.reshape(-1, centers.shape[-1]), "decoupled")
        options = check_options(metric="mse", backend=backend)._replace(alignment="decoupled", weight=float(alpha))
        super().__init__(centers, constants, options, views)
        self.separable = alpha == 1

    @classmethod
    def build(cls, config: Any, given: Given) -> DecoupledFlowMatching:
        assert given.centers is not None
        return cls(given.centers, views=config.views_per_step, alpha=config.alpha)


@method
class AnchoredFlowMatching(AnchoredFlow, _PerCenter):
    """Align the flows from a fixed point, by default the mean of the centres, to the class means; see `anchored_flow_loss`."""

    separable = True

    def __init__(
        self,
        centers: Tensor,
        *,
        anchor: Tensor | None = None,
        length_weight: float = 0.0,
        length_delta: float | None = None,
        views: int = 1,
        backend: str = "auto",
    ) -> None:
        constants = prepare(centers.reshape(-1, centers.shape[-1]), "anchored", anchor)
        options = check_options("anchored", backend=backend, length_weight=length_weight, length_delta=length_delta)
        super().__init__(centers, constants, options, views)

    @classmethod
    def build(cls, config: Any, given: Given) -> AnchoredFlowMatching:
        assert given.centers is not None
        return cls(
            given.centers,
            anchor=given.mean,
            length_weight=config.length_weight,
            length_delta=config.length_delta,
            views=config.views_per_step,
        )


def center_of(labels: Tensor, clusters: int, views: int) -> Tensor:
    """The row of the flattened (C, clusters, D) centres for each of a step's features (views * N); ``labels`` if clusters is 1.

    Within a view, the k-th image of a class belongs to the class's centre k.
    """
    if clusters == 1:
        return labels
    count = len(labels) // views
    order = torch.argsort(labels[:count], stable=True)  # every class has one image per cluster
    slot = torch.empty_like(order).scatter_(0, order, torch.arange(count, device=labels.device) % clusters)
    return labels * clusters + slot.repeat(views)


@method
class GradientMatching(Matching, Objective):
    """LGM: match the gradient of a new random linear classifier on synthetic views with that on a batch of real images.

    Variants: "closed-form" (frozen backbone, a formula instead of double backward), "frozen" (double backward) and "stock" (like
    the public code: the backbone's parameters require gradients, the features of real images have a graph too, double backward).
    """

    def __init__(self, config: Any, given: Given) -> None:
        source = given.source
        if source is None:
            raise InputError("method lgm matches gradients on real images and needs the data set")
        if not source.random_access:
            raise InputError(
                f"{source.name}: LGM draws random real images at every step, but this data set can only be read in order"
            )
        if not len(source):
            raise InputError(f"{source.name}: holds no images")
        self.backbone, self.source, self.num_classes = given.backbone, source, given.num_classes
        self.views, self.variant, self.seed = config.views_per_step, config.lgm_variant, config.seed
        self.augmentation = config.augmentation
        size = config.size or given.backbone.image_size
        self.transform = ImageTransform(size, size, given.channels)
        self.batch = min(config.ipc * self.views * given.num_classes, len(source))
        # The gradient to the images doesn't need the parameters' gradients, but the public code computes them, and so does "stock".
        self.backbone_gradients = self.trains_backbone(config)

    @classmethod
    def trains_backbone(cls, config: Any) -> bool:
        return bool(config.lgm_variant == "stock")

    @classmethod
    def build(cls, config: Any, given: Given) -> GradientMatching:
        return cls(config, given)

    def prepare(self, step: int) -> None:
        device = self.backbone.device
        classes = torch.arange(self.num_classes, device=device)
        self.weight = CLASSIFIER_STD * philox.normal(
            classes, self.backbone.num_features, seed=self.seed, stream=Stream.LINEAR_CLASSIFIER, step=step
        )
        self.bias = torch.zeros(self.num_classes, device=device)
        drawn = self.source.draw(self.batch, self.transform, seed=self.seed, step=step)
        images, labels = (tensor.to(device) for tensor in drawn)
        boxes = draw_views(
            torch.arange(len(images), device=device),
            (images.shape[2], images.shape[3]),
            self.backbone.input_size,
            self.backbone.mean,
            self.backbone.std,
            seed=self.seed,
            step=step,
            augmentation=self.augmentation,
            streams=(Stream.REAL_AUGMENT_PARAMETERS, Stream.REAL_AUGMENT_NOISE),
        )
        with torch.set_grad_enabled(self.variant == "stock"):
            views = augment(images, boxes, dtype=self.backbone.dtype)
            features = self.backbone(views)
        del images, views
        if self.variant == "closed-form":
            self.real_gradient = gradient_matching.linear_gradient(features, labels, self.weight, self.bias)
        else:
            self.real_gradient = gradient_matching.linear_gradient_autograd(
                features, labels, self.weight, self.bias, create_graph=False
            )

    def loss(self, features: Tensor, labels: Tensor, step: int) -> Tensor:
        if self.variant == "closed-form":
            gradient = gradient_matching.linear_gradient(features, labels, self.weight, self.bias)
        else:
            gradient = gradient_matching.linear_gradient_autograd(
                features, labels, self.weight, self.bias, create_graph=True
            )
        return gradient_matching.gradient_distance(gradient, self.real_gradient)
