"""Images and labels from folders, archives, arrays, data sets and data loaders."""

from typing import TYPE_CHECKING

from ..facade import lazy

if TYPE_CHECKING:
    from .datasets import open_dataset as open_dataset
    from .sources import ArraySource as ArraySource
    from .sources import ImageSource as ImageSource
    from .sources import IterableSource as IterableSource
    from .sources import MapSource as MapSource
    from .sources import from_iterable as from_iterable
    from .transforms import ImageTransform as ImageTransform

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "datasets": "open_dataset",
        "sources": "ArraySource ImageSource IterableSource MapSource from_iterable",
        "transforms": "ImageTransform",
    },
)
