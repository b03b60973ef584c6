"""sfm_fast: fast statistical flow matching, to distil data sets for frozen self-supervised vision models."""

from typing import TYPE_CHECKING, Any

from .errors import InputError
from .features.statistics import ClassStatistics
from .losses.functional import decoupled_flow_loss, flow_alignment_loss, linear_gradient_matching_loss
from .losses.module import FlowAlignmentLoss
from .ops.augment import augment
from .ops.backends import explain, explain_images
from .ops.render import render
from .ops.render_augment import render_augment
from .version import __version__
from .views import Augmentation, Views, draw_views

if TYPE_CHECKING:
    from .bundle.bundle import Bundle

__all__ = [
    "Augmentation",
    "Bundle",
    "ClassStatistics",
    "FlowAlignmentLoss",
    "InputError",
    "Views",
    "__version__",
    "augment",
    "decoupled_flow_loss",
    "draw_views",
    "explain",
    "explain_images",
    "flow_alignment_loss",
    "linear_gradient_matching_loss",
    "render",
    "render_augment",
]


def __getattr__(name: str) -> Any:
    """Load `Bundle` at its first use: the losses need none of what it brings along."""
    if name == "Bundle":
        from .bundle.bundle import Bundle

        return Bundle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
