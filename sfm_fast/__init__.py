"""sfm_fast: fast statistical flow matching, which distils data sets for frozen self-supervised vision models.

Every public name can be imported from here and loads its modules at the first use. `sfm_fast.ops` registers the operations
``torch.ops.sfm_fast``, and is imported with the first loss or image operation.
"""

from typing import TYPE_CHECKING

from .facade import lazy
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .backbones import Backbone as Backbone
    from .backbones import load_backbone as load_backbone
    from .backbones import prepare_frozen as prepare_frozen
    from .bundle import Bundle as Bundle
    from .data import from_iterable as from_iterable
    from .data import open_dataset as open_dataset
    from .distill.build import make_distiller as make_distiller
    from .distill.config import DistillConfig as DistillConfig
    from .distill.config import Execution as Execution
    from .distill.distiller import Distiller as Distiller
    from .distill.plan import plan as plan
    from .errors import InputError as InputError
    from .evaluation import (
        Classifier as Classifier,
    )
    from .evaluation import (
        Evaluator as Evaluator,
    )
    from .evaluation import (
        ProbeConfig as ProbeConfig,
    )
    from .evaluation import (
        Projector as Projector,
    )
    from .evaluation import (
        fit_projector as fit_projector,
    )
    from .evaluation import (
        train_classifier as train_classifier,
    )
    from .features import ClassStatistics as ClassStatistics
    from .features import FeatureCache as FeatureCache
    from .features import class_statistics as class_statistics
    from .losses import (
        FlowAlignmentLoss as FlowAlignmentLoss,
    )
    from .losses import (
        anchored_flow_loss as anchored_flow_loss,
    )
    from .losses import (
        decoupled_flow_loss as decoupled_flow_loss,
    )
    from .losses import (
        flow_alignment_loss as flow_alignment_loss,
    )
    from .losses import (
        linear_gradient_matching_loss as linear_gradient_matching_loss,
    )
    from .ops.augment import augment as augment
    from .ops.backends import explain as explain
    from .ops.backends import explain_images as explain_images
    from .ops.render import render as render
    from .ops.render_augment import render_augment as render_augment
    from .synthetic import SyntheticSet as SyntheticSet
    from .views import Augmentation as Augmentation
    from .views import Views as Views
    from .views import draw_views as draw_views

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "backbones": "Backbone load_backbone prepare_frozen",
        "bundle": "Bundle",
        "data": "from_iterable open_dataset",
        "distill.build": "make_distiller",
        "distill.config": "DistillConfig Execution",
        "distill.distiller": "Distiller",
        "distill.plan": "plan",
        "errors": "InputError",
        "evaluation": "Classifier Evaluator ProbeConfig Projector fit_projector train_classifier",
        "features": "ClassStatistics FeatureCache class_statistics",
        "losses": "FlowAlignmentLoss anchored_flow_loss decoupled_flow_loss flow_alignment_loss linear_gradient_matching_loss",
        "ops.augment": "augment",
        "ops.backends": "explain explain_images",
        "ops.render": "render",
        "ops.render_augment": "render_augment",
        "synthetic": "SyntheticSet",
        "version": "__version__",
        "views": "Augmentation Views draw_views",
    },
)
