"""Distillation: the synthetic images, the objectives, the step, and the loop around them."""
