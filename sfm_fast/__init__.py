"""sfm_fast: fast statistical flow matching, to distil data sets for frozen self-supervised vision models."""

from .errors import InputError
from .loss import FlowAlignmentLoss, decoupled_flow_loss, flow_alignment_loss, linear_gradient_matching_loss
from .ops.backends import explain
from .statistics import ClassStatistics
from .version import __version__

__all__ = [
    "ClassStatistics",
    "FlowAlignmentLoss",
    "InputError",
    "__version__",
    "decoupled_flow_loss",
    "explain",
    "flow_alignment_loss",
    "linear_gradient_matching_loss",
]
