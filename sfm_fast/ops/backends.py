"""Which implementation of an operation runs: one place decides, and says why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import InputError

BACKENDS = ("torch", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class Choice:
    """The backend a call takes, and for every other one the reason it was passed over."""

    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reasons[self.backend]}"]
        return "\n".join(lines + [f"not {name}: {why}" for name, why in self.reasons.items() if name != self.backend])


def explain(
    features: torch.Tensor, *, alignment: str = "global", metric: str = "cosine", backend: str = "auto"
) -> Choice:
    """Which backend a loss call on ``features`` would take and why each other one is passed over.

    Depends on device, dtype and shape alone, never on timing. Raises ``InputError`` for an unknown name, or for a
    backend asked for by name that can't take the call.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise InputError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
    reasons = {
        "torch": f"plain torch takes every call; {features.device.type}, {features.dtype}, alignment {alignment!r}, metric {metric!r}",
        "cpu": "this version has no C++ kernels for the losses",
        "triton": "this version has no Triton kernels for the losses",
        "cuda": "this version has no CUDA kernels for the losses",
    }
    if backend not in ("auto", "torch"):
        raise InputError(
            f"backend={backend!r} can't take this call: {reasons[backend]}; backend='auto' would take 'torch'"
        )
    return Choice("torch", reasons)
