"""Predicts a step's peak memory and floating-point operations with fake tensors: no device, no weights, no images needed.

The very code of the step runs on tensors without data; every allocation and release is counted. Micro-batches between the first and
the last one repeat what these do, and are skipped.
"""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..data.backbones import Backbone
from ..errors import InputError
from .config import DistillConfig
from .images import SyntheticImages
from .methods import DecoupledFlowMatching, FlowMatching, GradientMatching, Objective
from .optimiser import PyramidAdam
from .staging import FromHost, InPlace
from .step import DistillationStep, _Graph

CATEGORIES = ("parameters", "pyramid", "adam", "activations", "workspace")


@dataclass(frozen=True)
class Prediction:
    """Peak bytes of a step, what they are made of at that moment, and the step's floating-point operations.

    ``by_category``: bytes of the backbone's parameters, the pyramid, Adam's moments, activations kept for a backward, and everything
    else (views, gradients, features, temporaries). ``host_bytes``: pyramid and moments in host memory, not part of the peak.
    """

    peak_bytes: int
    by_category: dict[str, int]
    flops: int
    host_bytes: int = 0


@dataclass
class _Entry:
    category: str
    size: int


class Tracker(TorchDispatchMode):
    """Counts bytes of living storages by category, as operations allocate and Python releases them; and operations."""

    def __init__(self) -> None:
        super().__init__()
        self.known: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()
        self.flops = self.total = self.peak = 0
        self.fresh = "workspace"  # category of what is allocated now
        self.events: list[tuple[_Entry, int]] = []  # what came (1) and went (-1)
        self.peak_event = 0

    def assign(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Count the tensors' storages under ``category``; "" leaves them out."""
        for tensor in tensors:
            entry = self.known.get(tensor.untyped_storage())
            if entry is None:
                self._add(tensor, category)
            else:
                self.total += entry.size * (bool(category) - bool(entry.category))
                entry.category = category

    def living(self) -> set[int]:
        return {id(entry) for entry in self.known.values()}

    def keep(self, before: set[int], category: str) -> None:
        """What has come since `living` gave ``before``, and is still there, belongs to ``category``."""
        for entry in self.known.values():
            if id(entry) not in before and entry.category == "workspace":
                entry.category = category

    def restart(self) -> None:
        """Forget the peak so far."""
        self.events = [(entry, 1) for entry in self.known.values()]
        self.peak, self.peak_event = self.total, len(self.events)

    def at_peak(self) -> dict[str, int]:
        """Bytes by category when the total was largest."""
        found = dict.fromkeys(CATEGORIES, 0)
        for entry, sign in self.events[: self.peak_event]:
            if entry.category:
                found[entry.category] += sign * entry.size
        return found

    def _add(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        entry = _Entry(category, storage.nbytes())
        self.known[storage] = entry
        weakref.finalize(storage, self._happen, entry, -1)
        self._happen(entry, 1)

    def _happen(self, entry: _Entry, sign: int) -> None:
        self.events.append((entry, sign))
        if entry.category:
            self.total += sign * entry.size
        if self.total > self.peak:
            self.peak, self.peak_event = self.total, len(self.events)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.flops += _flops(function, args, kwargs or {}, result)
        if function is torch.ops.aten.convolution_backward.default:
            scratch = _Entry("workspace", args[2].nbytes)  # the weight again, in the order that the product wants
            self._happen(scratch, 1)
            self._happen(scratch, -1)
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.untyped_storage() not in self.known:
                self._add(value, self.fresh)
        return result


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    aten = torch.ops.aten
    if function is aten._scaled_dot_product_flash_attention_for_cpu.default:  # torch's registry knows the GPUs' alone
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if function is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    packet = function._overloadpacket
    return int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0


class _SampledStep(DistillationStep):
    """A step whose micro-batches between the first and the last do nothing; ``tracker`` counts operations of the others."""

    tracker: Tracker
    forward_flops = backward_flops = 0.0  # an image

    def _end(self, begin: int, stop: int) -> int:
        last = (math.ceil(self.images.num_images / self.micro_batch) - 1) * self.micro_batch
        if 0 < begin < last:
            return min(last, stop)
        return super()._end(begin, stop)

    def _skipped(self, begin: int, end: int) -> bool:
        return begin > 0 and end < self.images.num_images

    def _forward(self, views: Any, begin: int, end: int, keep: bool) -> _Graph:
        if self._skipped(begin, end):
            features = self.backbone.mean.new_empty((end - begin) * len(views.boxes), self.backbone.num_features)
            return _Graph(begin, end, features, features)
        before = self.tracker.flops
        graph = super()._forward(views, begin, end, keep)
        self.forward_flops = (self.tracker.flops - before) / (end - begin)
        return graph

    def _update(self, views: Any, gradient: Tensor, held: _Graph | None, first: int, last: int, bad: Tensor) -> None:
        if self._skipped(first, last):
            return
        before = self.tracker.flops
        super()._update(views, gradient, held, first, last, bad)
        if held:
            self.backward_flops = (self.tracker.flops - before) / (last - first)

    def _run(self, pyramid: Tensor, views: Any, begin: int, end: int, keep: bool) -> _Graph:
        before = self.tracker.living()
        graph = super()._run(pyramid, views, begin, end, keep)
        if keep:
            self.tracker.keep(before, "activations")
        return graph


class _SampledFromHost(FromHost):
    def __init__(self, device: torch.device, micro_batch: int) -> None:
        self.device, self.stream, self.coming, self.micro_batch = device, None, None, micro_batch

    def prefetch(self, state: Sequence[Tensor], begin: int, end: int) -> None:
        super().prefetch(state, begin, min(end, begin + self.micro_batch))


class _FakeGradientMatching(GradientMatching):
    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        size = self.transform.crop
        return torch.empty(self.batch, self.transform.channels, size, size), torch.zeros(self.batch, dtype=torch.int64)


class _NoImages:
    """Stands for a data set whose images are never read."""

    name, random_access = "no images", True

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


class _Objective(Objective):
    """``wrapped``, with the operations of its preparation counted."""

    prepare_flops = 0

    def __init__(self, wrapped: Objective, tracker: Tracker) -> None:
        self.tracker = tracker
        self.wrapped, self.views, self.backbone_gradients = wrapped, wrapped.views, wrapped.backbone_gradients

    def prepare(self, step: int) -> None:
        before = self.tracker.flops
        # "stock" runs its real side with a graph.
        self.tracker.fresh = "activations" if self.backbone_gradients else "workspace"
        self.wrapped.prepare(step)
        self.tracker.fresh = "workspace"
        self.prepare_flops = self.tracker.flops - before

    def loss(self, features: Tensor, labels: Tensor, step: int) -> Tensor:
        return self.wrapped.loss(features, labels, step)


def _objective(config: DistillConfig, backbone: Backbone, classes: int, channels: int, size: int) -> Objective:
    views = config.views_per_step
    if config.method == "lgm":
        source: Any = _NoImages(config.ipc * views * classes)
        return _FakeGradientMatching(
            backbone, source, classes, config.ipc, size, channels,
            views=views, variant=config.lgm_variant, augmentation=config.augmentation,
        )  # fmt: skip
    centers = torch.empty(classes, backbone.num_features, device=backbone.device)
    if config.method == "sfm":
        return FlowMatching(centers, views=views, alignment=config.alignment, metric=config.metric)
    return DecoupledFlowMatching(centers, views=views, alpha=config.alpha)


def predict_step(
    config: DistillConfig,
    backbone: Backbone,
    classes: int,
    channels: int,
    micro_batch: int | None = None,
    *,
    host_state: bool = False,
    count_parameters: bool = True,
) -> Prediction:
    """What a step of ``config`` with all levels live will take; see `Prediction`.

    backbone: a loaded one, or one of `shape_of_backbone` without weights. micro_batch: images at once (None: all).
    count_parameters: whether the backbone's weights are part of the peak.
    """
    tracker, device = Tracker(), backbone.device
    count, size = classes * config.ipc, config.size or backbone.image_size
    stock = config.method == "lgm" and config.lgm_variant == "stock"
    with FakeTensorMode(), tracker:
        model = _without_values(backbone.model, device).requires_grad_(stock)
        tracker.assign("parameters" if count_parameters else "", model.state_dict(keep_vars=True).values())
        stand_in = replace(
            backbone,
            model=model,
            mean=torch.empty(len(backbone.mean), device=device),
            std=torch.empty(len(backbone.std), device=device),
            run=None,
        )
        images = SyntheticImages(1, channels, size, parametrization=config.parametrization)
        images.num_images = count
        images.pyramid = nn.Parameter(torch.empty(count, 0, device="cpu" if host_state else device), False)
        images.allocate(len(images.sizes))
        optimiser = PyramidAdam(images, config.lr)
        pyramid, *moments = optimiser.state
        tracker.assign("" if host_state else "pyramid", [pyramid])
        tracker.assign("" if host_state else "adam", moments)
        objective = _Objective(_objective(config, stand_in, classes, channels, size), tracker)
        step = _SampledStep(
            images,
            torch.empty(count, dtype=torch.int64, device=device),
            objective,
            stand_in,
            optimiser,
            augmentation=config.augmentation,
            seed=config.seed,
            micro_batch=micro_batch or count,
            staging=_SampledFromHost(device, micro_batch or count) if host_state else InPlace(),
        )
        step.tracker = tracker
        tracker.restart()  # what it took to make all this is over
        step.compute(0)
    flops = objective.prepare_flops + count * (step.forward_flops + step.backward_flops)
    if count > step.micro_batch:  # all but the last micro-batch run forward twice
        flops += ((count - 1) // step.micro_batch) * step.micro_batch * step.forward_flops
    host = pyramid.nbytes + sum(tensor.nbytes for tensor in moments) if host_state else 0
    return Prediction(tracker.peak, tracker.at_peak(), round(flops), host)


def _without_values(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are made anew: inside a fake mode, without memory."""

    def like(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    copies: dict[int, Any] = {id(value): nn.Parameter(like(value), False) for value in model.parameters()}
    copies |= {id(value): like(value) for value in model.buffers()}
    for module in model.modules():  # and what models keep beside them, such as cached attention biases
        beside = {
            name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")
        }
        copies |= {id(value): like(value) for value in tree_iter(beside) if isinstance(value, Tensor)}
    return copy.deepcopy(model, copies)


def largest_micro_batch(peak: Callable[[int], int], count: int, budget: int) -> int:
    """The most of ``count`` images a micro-batch for which ``peak(micro_batch)`` stays within ``budget`` bytes; at least 1.

    All images in one where they fit: then no forward runs twice. Else at most half of them, in micro-batches of about equal size.
    """
    if peak(count) <= budget:
        return count
    # The peak grows nearly linearly: two small cases say where the budget ends; what is found there closes in on it.
    most = (count + 1) // 2
    known = {size: peak(size) for size in {min(4, most), min(32, most)}}
    while True:
        fits = max((size for size, taken in known.items() if taken <= budget), default=0)
        fails = min((size for size, taken in known.items() if taken > budget), default=most + 1)
        if fails - fits <= 1 or len(known) > 12:
            return math.ceil(count / math.ceil(count / max(fits, 1)))
        low, high = min(known), max(known)
        slope = max((known[high] - known[low]) / max(high - low, 1), 1.0)
        nearest = min(known, key=lambda size: abs(known[size] - budget))
        guess = int(nearest + (budget - known[nearest]) / slope)
        guess = min(max(guess, fits + 1), fails - 1)
        known[guess] = peak(guess)


def plan_rows(
    config: DistillConfig,
    backbone: Backbone,
    classes: int,
    channels: int,
    *,
    memory: int,
    micro_batches: Sequence[int] = (),
    lgm_views: int = 10,
) -> list[dict[str, Any]]:
    """One row a way of running a step: SFM in one shot, in micro-batches that fit ``memory`` bytes (with the state on the device and on
    the host) and of the sizes asked for, then LGM's three forms, one of them in the same micro-batches. ``recommended`` marks the fastest that fits.
    """
    for size in micro_batches:
        if size < 1:
            raise InputError(f"--micro-batch must be at least 1, got {size}")
    count, rows = classes * config.ipc, []

    @functools.cache
    def predict(configured: DistillConfig, micro_batch: int, host: bool) -> Prediction:
        return predict_step(configured, backbone, classes, channels, micro_batch, host_state=host)

    def row(configured: DistillConfig, variant: str, micro_batch: int | None, host: bool = False) -> dict[str, Any]:
        found = predict(configured, micro_batch or count, host)
        return {
            "method": "lgm" if configured.method == "lgm" else "sfm",
            "variant": variant,
            "micro_batch": micro_batch,
            "views": configured.views_per_step,
            "peak_bytes": found.peak_bytes,
            "by_category": found.by_category,
            "flops_per_step": found.flops,
            "host_bytes": found.host_bytes,
            "fits": found.peak_bytes <= memory,
            "recommended": False,
        }

    rows.append(row(config, "one-shot", None))
    for host in (False, True):

        def peak(size: int, host: bool = host) -> int:
            return predict(config, size, host).peak_bytes

        largest = largest_micro_batch(peak, count, memory)
        if largest < count or host:
            parts = "micro-batched" if largest < count else "one-shot"
            rows.append(row(config, f"{parts}, state on host" if host else parts, largest, host))
    for size in micro_batches:
        rows.append(row(config, "micro-batched", min(size, count)))
    fitting = [candidate for candidate in rows if candidate["fits"]]
    if fitting:
        # A GPU is poorly used by a handful of images: then rather bring the state from the host.
        roomy = [candidate for candidate in fitting if (candidate["micro_batch"] or count) >= min(8, count)] or fitting
        roomy[0]["recommended"] = True
    for variant in ("closed-form", "frozen", "stock"):
        lgm = replace(config, method="lgm", lgm_variant=variant, views=lgm_views)
        rows.append(row(lgm, variant, None))
        if variant == "closed-form" and fitting and roomy and roomy[0]["micro_batch"]:
            # Not what LGM's code does, but what this package's step does for it.
            rows.append(row(lgm, f"{variant}, micro-batched", roomy[0]["micro_batch"]))
    return rows
