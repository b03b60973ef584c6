"""Frozen backbones: the shipped ones, timm's models, and their identity."""

from typing import TYPE_CHECKING

from ..facade import lazy

if TYPE_CHECKING:
    from .backbone import Backbone as Backbone
    from .load import freeze as freeze
    from .load import load_backbone as load_backbone
    from .load import resolve_device as resolve_device
    from .load import shape_of_backbone as shape_of_backbone
    from .names import DEFAULT as DEFAULT
    from .names import SHIPPED as SHIPPED
    from .prepare import prepare_frozen as prepare_frozen

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "backbone": "Backbone",
        "load": "freeze load_backbone resolve_device shape_of_backbone",
        "names": "DEFAULT SHIPPED",
        "prepare": "prepare_frozen",
    },
)
