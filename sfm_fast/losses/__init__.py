"""The losses on features: statistical flow matching, its decoupled and anchored variants, and linear gradient matching."""

from typing import TYPE_CHECKING

from ..facade import lazy

if TYPE_CHECKING:
    from .functional import anchored_flow_loss as anchored_flow_loss
    from .functional import decoupled_flow_loss as decoupled_flow_loss
    from .functional import flow_alignment_loss as flow_alignment_loss
    from .functional import linear_gradient_matching_loss as linear_gradient_matching_loss
    from .module import FlowAlignmentLoss as FlowAlignmentLoss

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "functional": "anchored_flow_loss decoupled_flow_loss flow_alignment_loss linear_gradient_matching_loss",
        "module": "FlowAlignmentLoss",
    },
)
