"""Bundles: synthetic images, classifier and projector in one file that classifies photos."""

from typing import TYPE_CHECKING

from ..facade import lazy

if TYPE_CHECKING:
    from .bundle import Bundle as Bundle

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {"bundle": "Bundle"},
)
