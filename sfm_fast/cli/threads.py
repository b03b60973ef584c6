"""How the threads of a command wait for each other, which OpenMP decides when torch is loaded."""

from __future__ import annotations

from collections.abc import MutableMapping

# A waiting thread spins, then sleeps. By default it spins for milliseconds, which is as good as any on idle cores. On a busy machine it
# spins on a core that the thread it waits for needs, and each of a model's hundreds of parallel loops may cost a time slice.
# Measured in docs/cpu.md. Rounds of GNU's runtime (GOMP_SPINCOUNT), milliseconds of Intel's and LLVM's (KMP_BLOCKTIME).
SPINNING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
CHOSEN = (*SPINNING, "OMP_WAIT_POLICY", "KMP_LIBRARY")


def bound_spinning(environment: MutableMapping[str, str]) -> None:
    """Let waiting threads sleep soon, unless the user's ``environment`` says how they wait. Has an effect only before torch is imported."""
    if not any(name in environment for name in CHOSEN):
        environment.update(SPINNING)
