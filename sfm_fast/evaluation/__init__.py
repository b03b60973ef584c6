"""Accuracy of classifiers from a few images: probes, classifier inheritance, knowledge distillation, and references on real images."""

from typing import TYPE_CHECKING

from ..facade import lazy

if TYPE_CHECKING:
    from .classifier import accuracy as accuracy
    from .classifier import train_classifier as train_classifier
    from .classifier import train_on_source as train_on_source
    from .evaluator import Evaluator as Evaluator
    from .heads import Classifier as Classifier
    from .heads import LinearMap as LinearMap
    from .heads import Projector as Projector
    from .heads import compose as compose
    from .modes import MODES as MODES
    from .modes import ProbeConfig as ProbeConfig
    from .projector import fit_projector as fit_projector
    from .references import REFERENCES as REFERENCES

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "classifier": "accuracy train_classifier train_on_source",
        "evaluator": "Evaluator",
        "heads": "Classifier LinearMap Projector compose",
        "modes": "MODES ProbeConfig",
        "projector": "fit_projector",
        "references": "REFERENCES",
    },
)
