"""One built tree, measured on command: a line of JSON in, a line of JSON out.

    PYTHONPATH=TREE python -P worker.py TREE PERF    # TREE: a folder with sfm_fast; PERF: the perf.py to measure with

Needs torch and what ``sfm_fast`` has long offered, so that older trees can be measured too; what a tree lacks answers with an
error. Between commands it waits for its standard input and takes no processor time.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], tuple[Tensor, ...]]  # a result, and the gradients that go with it
Maker = Callable[[torch.device], Call]
SAMPLE_SECONDS = 6e-3


def loss_case(kind: str, classes: int, dim: int, ipc: int, dtype: str) -> Maker:
    """Forward and backward of a loss: "global cosine", … or "decoupled"; ipc > 1: with labels."""

    def make(device: torch.device) -> Call:
        import sfm_fast

        generator = torch.Generator().manual_seed(classes + dim)
        offset = 5 * torch.randn(dim, generator=generator)
        centers = (offset + torch.randn(classes, dim, generator=generator)).to(device)
        features = offset + torch.randn(classes * ipc, dim, generator=generator)
        labels = None
        if ipc > 1:
            labels = torch.arange(classes).repeat(ipc)[torch.randperm(classes * ipc, generator=generator)].to(device)
        leaf = features.to(device, getattr(torch, dtype)).requires_grad_()

        def call() -> tuple[Tensor, ...]:
            if kind == "decoupled":
                loss = sfm_fast.decoupled_flow_loss(leaf, centers, labels, alpha=0.5)
            else:
                alignment, metric = kind.split()
                loss = sfm_fast.flow_alignment_loss(leaf, centers, labels, alignment=alignment, metric=metric)
            return (loss.detach(), *torch.autograd.grad(loss, leaf))

        return call

    return make


def image_case(kind: str, images: int, channels: int, canvas: int, size: int, dtype: str) -> Maker:
    """Forward and backward of "render", "augment" or "render_augment"; dtype of what comes out."""

    def make(device: torch.device) -> Call:
        import sfm_fast

        generator, wanted = torch.Generator().manual_seed(images + canvas), getattr(torch, dtype)
        sides = [side for side in (2**k for k in range(12)) if side < canvas] + [canvas]
        levels = [
            (torch.randn(images, channels, side, side, generator=generator) / len(sides)).to(device) for side in sides
        ]
        picture = torch.rand(images, channels, canvas, canvas, generator=generator).to(device)
        leaves = [picture] if kind == "augment" else levels
        leaves = [leaf.requires_grad_() for leaf in leaves]
        mean, std = torch.full((channels,), 0.45), torch.full((channels,), 0.225)
        views = sfm_fast.draw_views(torch.arange(images), canvas, size, mean, std, seed=1, step=7)
        moved = {name: getattr(views, name).to(device) for name in ("boxes", "noise_items", "mean", "std")}
        views = replace(views, **moved)
        side = canvas if kind == "render" else size
        grad = torch.randn(images, channels, side, side, generator=generator).to(device, wanted)

        def call() -> tuple[Tensor, ...]:
            if kind == "render":
                shown = sfm_fast.render(leaves, canvas, dtype=wanted)
            elif kind == "augment":
                shown = sfm_fast.augment(leaves[0], views, dtype=wanted)
            else:
                shown = sfm_fast.render_augment(leaves, canvas, views, dtype=wanted)
            return (shown.detach(), *torch.autograd.grad(shown, leaves, grad))

        return call

    return make


KINDS = ("global cosine", "class cosine", "global mse", "pair cosine", "pair mse", "decoupled")
DTYPES = ("float32", "bfloat16")


def _losses(shapes: list[tuple[int, int, int]], kinds: tuple[str, ...] = KINDS) -> dict[str, Maker]:
    return {
        f"{kind} {classes}x{dim}{f' ipc {ipc}' if ipc > 1 else ''} {dtype}": loss_case(kind, classes, dim, ipc, dtype)
        for kind in kinds
        for classes, dim, ipc in shapes
        for dtype in DTYPES
    }


def _images(shapes: list[tuple[int, int, int, int]]) -> dict[str, Maker]:
    return {
        f"{kind} {images}x{channels}x{canvas} to {size} {dtype}": image_case(
            kind, images, channels, canvas, size, dtype
        )
        for kind in ("render", "augment", "render_augment")
        for images, channels, canvas, size in shapes
        for dtype in DTYPES
    }


_SMALL = {**_losses([(24, 64, 1), (8, 64, 3)]), **_images([(2, 3, 24, 20)])}
_MIDDLE = {**_losses([(300, 384, 1), (100, 768, 10)]), **_images([(10, 1, 28, 28), (2, 3, 256, 224)])}
_LARGE = _losses([(1000, 768, 1)], ("global cosine", "class cosine", "global mse"))
CASES: dict[str, Maker] = {**_SMALL, **_MIDDLE, **_LARGE}
BYTES = (*_MIDDLE, *_LARGE)
# Valgrind is slow: every kernel once, every dtype and form of labels with some.
INSTRUCTIONS = tuple(name for name in _SMALL if name.endswith(" float32" if " ipc " not in name else " bfloat16"))
TIMES = (
    *(f"{kind} 1000x768 float32" for kind in ("global cosine", "class cosine")),
    *(f"{kind} 300x384 float32" for kind in ("pair cosine", "decoupled")),
    "pair cosine 100x768 ipc 10 bfloat16",
    *(f"{kind} 2x3x256 to 224 float32" for kind in ("render", "augment", "render_augment")),
)
STEPS: dict[str, tuple[dict[str, Any], int | None]] = {
    "SFM one-shot": ({}, None),
    "SFM micro-batch 5": ({}, 5),
    "SFM pair one-shot": ({"alignment": "pair"}, None),
    **{f"LGM {variant}": ({"method": "lgm", "lgm_variant": variant}, None) for variant in ("closed-form", "frozen", "stock")},
}  # fmt: skip


def predict(name: str, classes: int = 10) -> dict[str, int]:
    """Peak bytes and operations of a step of the shipped backbone at ipc 1, as the tree itself predicts them."""
    from sfm_fast.backbones.load import load_backbone
    from sfm_fast.distill.config import DistillConfig
    from sfm_fast.distill.predict import predict_step

    options, micro_batch = STEPS[name]
    found = predict_step(DistillConfig(**options), load_backbone(), classes, 1, micro_batch)
    return {"peak_bytes": found.peak_bytes, "flops": found.flops}


def make_all(names: Iterable[str]) -> dict[str, Call]:
    """Calls of these cases on one thread of the CPU, each called once already."""
    torch.set_num_threads(1)
    calls = {name: CASES[name](torch.device("cpu")) for name in names}
    for call in calls.values():
        call()
    return calls


def use_tree(tree: str) -> None:
    """Make sure that ``sfm_fast`` is the one of ``tree``: an editable installation would lend what an older tree lacks."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
    import sfm_fast

    if not Path(sfm_fast.__file__).resolve().is_relative_to(Path(tree).resolve()):
        raise SystemExit(f"worker: sfm_fast came from {sfm_fast.__file__}, wanted the one in {tree}")


class Worker:
    """What the commands do; ``perf`` is the module that measures memory."""

    def __init__(self, perf: Any) -> None:
        self.perf, self.device = perf, torch.device("cpu")
        self.calls: dict[str, Call] = {}

    def start(self, device: str, threads: int) -> dict[str, Any]:
        self.device = torch.device(device)
        torch.set_num_threads(threads)
        return {"torch": torch.__version__}

    def predict(self, case: str) -> dict[str, int]:
        return predict(case)

    def bytes(self, case: str) -> dict[str, int]:
        call = CASES[case](self.device)
        call()  # what is prepared once and remembered is not part of a call
        return {"bytes": self.perf.peak_memory(call, self.device)}

    def prepare(self, case: str, path: str, spare: int = 0) -> dict[str, float]:
        """Make a case, write its result to ``path``, and say how many calls make a sample.

        ``spare`` bytes are taken before, so that the case comes to lie elsewhere than the last time.
        """
        self.spare = torch.ones(spare, dtype=torch.uint8)
        call = self.calls[case] = CASES[case](self.device)
        result = [value.float().cpu() for value in call()]
        if not all(bool(value.isfinite().all()) for value in result):
            raise ValueError("the result is not finite")
        torch.save(result, path)
        gc.collect()
        gc.disable()
        seconds = min(self._timed(call, 1) for _ in range(5))
        return {"repeats": max(1, min(1000, round(SAMPLE_SECONDS / seconds)))}

    def sample(self, case: str, repeats: int) -> dict[str, float]:
        """Seconds a call, over ``repeats`` of them; some more before fill the caches that the other process has emptied."""
        call = self.calls[case]
        for _ in range((repeats + 1) // 2):
            call()
        return {"seconds": self._timed(call, repeats) / repeats}

    def forget(self) -> dict[str, float]:
        self.calls.clear()
        return {}

    def _timed(self, call: Call, repeats: int) -> float:
        # One thread's processor time doesn't see how often others were given the processor; several threads' hides what they wait.
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
        self._wait()
        begin = clock()
        for _ in range(repeats):
            call()
        self._wait()
        return clock() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> None:
    tree, perf_file = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what anything else prints must not come between
    use_tree(tree)
    spec = importlib.util.spec_from_file_location("perf", perf_file)
    assert spec is not None
    assert spec.loader is not None
    perf = importlib.util.module_from_spec(spec)
    sys.modules["perf"] = perf  # where its data classes look for their annotations
    spec.loader.exec_module(perf)
    worker = Worker(perf)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # whatever an older tree can't do
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
