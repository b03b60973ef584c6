"""Provides the blocks of images for a step: from device memory, or from host memory with copies that overlap the computation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class InPlace:
    """State in the device's memory: a block is a slice."""

    def fetch(self, state: Sequence[Tensor], begin: int, end: int) -> tuple[Tensor, ...]:
        return tuple(tensor[begin:end] for tensor in state)

    def prefetch(self, state: Sequence[Tensor], begin: int, end: int) -> None:
        """Does nothing: the state is on the device."""

    def store(self, state: Sequence[Tensor], begin: int, end: int, block: Sequence[Tensor]) -> None:
        """Does nothing: the slice was changed in place."""

    def finish(self) -> None:
        """Does nothing: there are no copies to wait for."""


class FromHost(InPlace):
    """State in host memory (pinned for a GPU); the next block is copied while the current one is computed.

    All copies run in order on one separate stream, so a block that was stored is complete when it is fetched again.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.coming: tuple[tuple[int, ...], tuple[Tensor, ...], torch.cuda.Event | None] | None = None

    def prefetch(self, state: Sequence[Tensor], begin: int, end: int) -> None:
        name = (begin, end, len(state))  # enough within one step, which always uses the same state tensors
        if self.coming is not None and self.coming[0] == name:
            return
        if self.stream is None:
            self.coming = name, tuple(tensor[begin:end].to(self.device, copy=True) for tensor in state), None
            return
        with torch.cuda.stream(self.stream):
            block = tuple(tensor[begin:end].to(self.device, non_blocking=True) for tensor in state)
            event = torch.cuda.Event()
            event.record(self.stream)
        self.coming = name, block, event

    def fetch(self, state: Sequence[Tensor], begin: int, end: int) -> tuple[Tensor, ...]:
        self.prefetch(state, begin, end)
        assert self.coming is not None
        _, block, event = self.coming
        self.coming = None
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for tensor in block:
                tensor.record_stream(stream)  # its memory must not be reused before the computation is done
        return block

    def store(self, state: Sequence[Tensor], begin: int, end: int, block: Sequence[Tensor]) -> None:
        if self.stream is None:
            for tensor, part in zip(state, block, strict=True):
                tensor[begin:end].copy_(part)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for tensor, part in zip(state, block, strict=True):
                tensor[begin:end].copy_(part, non_blocking=True)
                part.record_stream(self.stream)

    def finish(self) -> None:
        """Let the current stream wait for all copies; the host memory may be read after synchronising with it."""
        self.coming = None
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
