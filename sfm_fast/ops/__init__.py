"""The operations: each with its schema, its implementations and its derivatives. Importing this registers them all."""

from . import augment, class_means, flow_alignment, pair_alignment, render, render_augment

__all__ = ["augment", "class_means", "flow_alignment", "pair_alignment", "render", "render_augment"]
