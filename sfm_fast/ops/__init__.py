"""The operations with their schemas, implementations and derivatives. Importing this package registers all of them."""

from . import augment, class_means, flow_alignment, pair_alignment, render, render_augment

__all__ = ["augment", "class_means", "flow_alignment", "pair_alignment", "render", "render_augment"]
