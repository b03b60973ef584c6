"""Real images and frozen backbones."""
