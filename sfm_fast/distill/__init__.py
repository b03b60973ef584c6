"""Distillation: its configuration, methods, step and run, and the prediction of a step's memory."""

from typing import TYPE_CHECKING

from ..facade import lazy

if TYPE_CHECKING:
    from .build import make_distiller as make_distiller
    from .config import DistillConfig as DistillConfig
    from .config import Execution as Execution
    from .distiller import Distiller as Distiller
    from .objectives import AnchoredFlowMatching as AnchoredFlowMatching
    from .objectives import DecoupledFlowMatching as DecoupledFlowMatching
    from .objectives import FlowMatching as FlowMatching
    from .objectives import GradientMatching as GradientMatching
    from .objectives import Objective as Objective
    from .predict import Prediction as Prediction
    from .predict import predict_step as predict_step
    from .run import Interrupted as Interrupted
    from .step import DistillationStep as DistillationStep
    from .step import StepFailed as StepFailed

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "build": "make_distiller",
        "config": "DistillConfig Execution",
        "distiller": "Distiller",
        "objectives": "AnchoredFlowMatching DecoupledFlowMatching FlowMatching GradientMatching Objective",
        "run": "Interrupted",
        "predict": "Prediction predict_step",
        "step": "DistillationStep StepFailed",
    },
)
