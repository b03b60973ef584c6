"""Whole distillation steps: every way of running one, checked, predicted and measured."""
