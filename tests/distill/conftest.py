"""What tests of distillation share."""

from __future__ import annotations

import pytest

from sfm_fast.backbones.load import load_backbone


@pytest.fixture(scope="module")
def backbone():
    """The shipped ViT."""
    return load_backbone()
