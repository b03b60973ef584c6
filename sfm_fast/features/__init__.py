"""Features and class statistics of a data set on a backbone, and a cache for features."""

from typing import TYPE_CHECKING

from ..facade import lazy

if TYPE_CHECKING:
    from .cache import FeatureCache as FeatureCache
    from .compute import class_statistics as class_statistics
    from .compute import dataset_features as dataset_features
    from .compute import view_features as view_features
    from .statistics import ClassStatistics as ClassStatistics

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "statistics": "ClassStatistics",
        "compute": "class_statistics dataset_features view_features",
        "cache": "FeatureCache",
    },
)
