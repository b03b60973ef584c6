"""What the accuracy table holds: the runs, in the order of their worth, and how long each goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sfm_fast.distill.config import DistillConfig

BACKBONES = VIT, CNN, LITE = "fashion_vit", "fashion_cnn", "tf_efficientnet_lite0"
SHIPPED = (VIT, CNN)
# Steps of LGM and of all runs that are compared with it at equal steps, by images per class; in 15 minutes LGM takes no 100 steps at 50.
EQUAL = {1: 400, 10: 100}
LONGEST = {1: 1600, 10: 400, 50: 200}  # steps after which a run that still improves ends, on one backbone
LEAST = 100  # steps of LGM
OURS, BOTH = "SFM", "SFM for both"  # with the default settings
CONVERGED, EQUAL_STEPS, EQUAL_TIME = ", converged", ", equal steps", ", equal time"
LGM, LGM_REAL = "LGM", "LGM from real images"


@dataclass(frozen=True)
class Run:
    """Images of one kind, for some backbones, with seeds 0, 1, …

    name: of the method. made_for: the backbones that the images are made for. until: "steps": all of ``config.steps``; "converged": until a
    validation probe stops rising, but at most so many; "time": as many as fit into the time of `OURS` for the same backbone, but at least `LEAST`.
    wide: whether the images are evaluated on all backbones and in all modes, instead of by a probe on those they are made for.
    """

    name: str
    made_for: tuple[str, ...]
    ipc: int
    config: Callable[[int], DistillConfig]
    until: str = "steps"
    seeds: int = 3
    wide: bool = False

    @property
    def label(self) -> str:
        """How the rows of its last images are called."""
        return self.name + {"converged": CONVERGED, "time": EQUAL_TIME, "steps": EQUAL_STEPS}[self.until]


def ours(ipc: int, seed: int, *, steps: int | None = None, **options: Any) -> DistillConfig:
    """The default settings, with the step size of the default number of steps."""
    lr = DistillConfig(init="real").schedule(1).lr
    return DistillConfig(ipc=ipc, seed=seed, steps=steps or LONGEST[ipc], **({"lr": lr} | options))


def paper(ipc: int, steps: int, seed: int, **options: Any) -> DistillConfig:
    """The papers' settings, but a step size for few steps."""
    return DistillConfig.paper(ipc=ipc, seed=seed, steps=steps, **({"lr": 0.02} | options))


def runs(ipcs: tuple[int, ...], backbones: tuple[str, ...], seeds: int, *, full: bool) -> Iterator[Run]:
    """All runs, the most telling first. ``full``: also those for whoever has a day."""
    made = [run for run in _all(seeds, full) if run.ipc in ipcs and set(run.made_for) <= set(backbones)]
    yield from made


def _all(seeds: int, full: bool) -> Iterator[Run]:
    some, slow = [(name,) for name in SHIPPED], (LITE,)
    for ipc in (1, 10):
        for made_for in some:
            yield Run(OURS, made_for, ipc, functools.partial(ours, ipc), "converged", seeds, True)
        yield Run(BOTH, SHIPPED, ipc, functools.partial(ours, ipc), "converged", seeds, True)
        for made_for in some:
            lgm = functools.partial(paper, ipc, EQUAL[ipc], method="lgm")
            yield Run(LGM, made_for, ipc, lgm, "steps", seeds, True)
    yield Run(OURS, slow, 1, functools.partial(ours, 1), "converged", seeds, True)
    for made_for in (*some, slow):
        yield Run(LGM, made_for, 1, functools.partial(paper, 1, LEAST, method="lgm"), "time", seeds, True)
    yield Run(LGM, slow, 1, functools.partial(paper, 1, EQUAL[1], method="lgm"), "steps", seeds if full else 1, True)
    for ipc in (1, 10):
        for made_for in some:
            for name, options in PAPER_METHODS.items():
                yield Run(
                    name, made_for, ipc, functools.partial(paper, ipc, EQUAL[ipc], **options), "steps", seeds, True
                )
            for name, options in ABLATIONS.items():
                changed = functools.partial(ours, ipc, steps=EQUAL[ipc], **options)
                yield Run(name, made_for, ipc, changed, "steps", seeds, full)
    for made_for in some:
        yield Run(OURS, made_for, 50, functools.partial(ours, 50), "converged", 1, True)
        long = functools.partial(paper, 1, 4 * EQUAL[1], method="lgm")
        yield Run(LGM, made_for, 1, long, "converged", seeds if full else 1, full)
        real = functools.partial(paper, 1, EQUAL[1], method="lgm", init="real")
        yield Run(LGM_REAL, made_for, 1, real, "steps", seeds if full else 1, True)
    yield Run(OURS, slow, 10, functools.partial(ours, 10, steps=200), "converged", seeds if full else 1, True)
    yield Run(LGM, slow, 10, functools.partial(paper, 10, LEAST, method="lgm"), "time", seeds if full else 1, True)
    if full:
        for made_for in some:
            yield Run(LGM, made_for, 10, functools.partial(paper, 10, 800, method="lgm"), "converged", seeds, True)
            yield Run(LGM, made_for, 50, functools.partial(paper, 50, LEAST, method="lgm"), "time", 1, True)
        yield Run(OURS, slow, 50, functools.partial(ours, 50), "converged", 1, True)


PAPER_METHODS: dict[str, dict[str, Any]] = {
    "SFM as in the paper": {},
    "SFM decoupled, as in the paper": {"method": "sfm-decoupled"},
}
# One change of the default settings each.
ABLATIONS: dict[str, dict[str, Any]] = {
    "SFM from noise": {"init": "noise", "lr": 0.02},
    "SFM, means as centres": {"centers": "means"},
    "SFM, discriminant centres": {"centers": "discriminant"},
    "SFM, squared error": {"method": "sfm-decoupled"},
}
