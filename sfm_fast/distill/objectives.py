"""What a step minimises: statistical flow matching, its decoupled form, linear gradient matching; one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .. import philox
from ..backbones.backbone import Backbone
from ..checks import check_labels
from ..data.sources import ImageSource
from ..data.transforms import ImageTransform
from ..errors import InputError
from ..losses.functional import decoupled_flow_loss
from ..losses.module import FlowAlignmentLoss
from ..ops.augment import augment
from ..philox import Stream
from ..reference import gradient_matching
from ..views import Augmentation, draw_views

METHODS = ("sfm", "sfm-decoupled", "lgm")
LEVELS = ("class", "cluster")
LGM_VARIANTS = ("closed-form", "frozen", "stock")
CLASSIFIER_STD = 0.01


class Objective(ABC):
    """A loss on the features of the synthetic images.

    ``views``: augmented views of every synthetic image a step. `prepare` runs before the synthetic side of a step and
    may load real images; `loss` gets features (views * N, D) and labels (views * N,) int64.
    """

    views: int = 1
    # Whether the backbone's own gradients are computed too, as the public code of LGM does.
    backbone_gradients: bool = False

    def prepare(self, step: int) -> None:  # noqa: B027 (nothing to prepare is a fine default)
        """Whatever ``step`` needs before the synthetic images are rendered."""

    @abstractmethod
    def loss(self, features: Tensor, labels: Tensor, step: int) -> Tensor:
        """Scalar loss of ``step``."""


class FlowMatching(Objective):
    """SFM: align the flows between class means with those between the centres, loaded once.

    centers: (C, D), or (C, K, D) for cluster-level matching: image k of a class against the class's k-means centre k, and no
    flow between centres of one class; with alignment "pair" only.
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

    def loss(self, features: Tensor, labels: Tensor, step: int) -> Tensor:
        loss: Tensor = self.criterion(features, center_of(labels, self.clusters, self.views))
        return loss


class DecoupledFlowMatching(Objective):
    """SFM's decoupled variant: mean squared error to the centre and to the mean of the others.

    centers: (C, D), or (C, K, D) for cluster-level matching: image k of a class against the class's k-means centre k.
    """

    def __init__(self, centers: Tensor, *, views: int = 1, alpha: float = 1.0) -> None:
        self.views, self.alpha = views, alpha
        self.clusters = centers.shape[1] if centers.ndim == 3 else 1
        self.centers = centers.reshape(-1, centers.shape[-1])

    def loss(self, features: Tensor, labels: Tensor, step: int) -> Tensor:
        labels = center_of(labels, self.clusters, self.views)
        return decoupled_flow_loss(features, self.centers, labels, alpha=self.alpha)


def center_of(labels: Tensor, clusters: int, views: int) -> Tensor:
    """Rows of the flattened (C, clusters, D) centres that a step's features (views * N) belong to; ``labels`` where clusters is 1.

    Within a view, the k-th image of a class (in order) belongs to the class's centre k.
    """
    if clusters == 1:
        return labels
    count = len(labels) // views
    order = torch.argsort(labels[:count], stable=True)  # every class has as many images as clusters
    slot = torch.empty_like(order).scatter_(0, order, torch.arange(count, device=labels.device) % clusters)
    return labels * clusters + slot.repeat(views)


class GradientMatching(Objective):
    """LGM: match a fresh linear classifier's gradient on synthetic views with that on a batch of real images.

    Variants: "closed-form" (frozen backbone, formula instead of double backward), "frozen" (double backward) and
    "stock" (as the public code: backbone left requiring grad, the real side run with grad too, double backward).
    """

    def __init__(
        self,
        backbone: Backbone,
        source: ImageSource,
        num_classes: int,
        ipc: int,
        image_size: int,
        channels: int,
        *,
        views: int = 10,
        variant: str = "closed-form",
        augmentation: Augmentation = Augmentation(),
        seed: int = 0,
    ) -> None:
        if variant not in LGM_VARIANTS:
            raise InputError(f"lgm_variant must be one of {LGM_VARIANTS}, got {variant!r}")
        if not source.random_access:
            raise InputError(
                f"{source.name}: LGM draws real images at random at every step, and this data set can only be read in order"
            )
        self.backbone, self.source, self.num_classes, self.views, self.variant, self.seed = (
            backbone,
            source,
            num_classes,
            views,
            variant,
            seed,
        )
        self.augmentation = augmentation
        self.transform = ImageTransform(image_size, image_size, channels)
        if not len(source):
            raise InputError(f"{source.name}: holds no images")
        self.batch = min(ipc * views * num_classes, len(source))
        # Frozen, the input's gradient still flows; "stock" leaves what the public code leaves on.
        self.backbone_gradients = variant == "stock"
        backbone.model.requires_grad_(self.backbone_gradients)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """The step's real images (B, channels, H, W) and labels (B,)."""
        chosen = philox.permutation(len(self.source), seed=self.seed, stream=Stream.REAL_BATCH, step=step)[: self.batch]
        images, labels = self.source.take(chosen.tolist(), self.transform)
        check_labels(f"labels of {self.source.name}", labels, len(images), self.num_classes)
        return images, labels

    def prepare(self, step: int) -> None:
        device = self.backbone.device
        classes = torch.arange(self.num_classes, device=device)
        self.weight = CLASSIFIER_STD * philox.normal(
            classes, self.backbone.num_features, seed=self.seed, stream=Stream.LINEAR_CLASSIFIER, step=step
        )
        self.bias = torch.zeros(self.num_classes, device=device)
        images, labels = (tensor.to(device) for tensor in self.draw(step))
        drawn = draw_views(
            torch.arange(len(images), device=device),
            (images.shape[2], images.shape[3]),
            self.backbone.input_size,
            self.backbone.mean,
            self.backbone.std,
            seed=self.seed,
            step=step,
            augmentation=self.augmentation,
            parameter_stream=Stream.REAL_AUGMENT_PARAMETERS,
            noise_stream=Stream.REAL_AUGMENT_NOISE,
        )
        with torch.set_grad_enabled(self.variant == "stock"):
            views = augment(images, drawn, dtype=self.backbone.dtype)
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
