"""The flow-alignment loss as a module, with the constants of its centres."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_anchor, check_centers, kind_of
from ..errors import InputError
from ..ops.pair_alignment import Pairs
from ..reference.pair_alignment import count_pairs
from .evaluate import (
    Constants,
    check_options,
    evaluate,
    pairs_of,
    prepare,
    rows_of,
)


class FlowAlignmentLoss(nn.Module):
    """`flow_alignment_loss` with the constants of ``centers`` prepared once and kept in the state_dict.

    ``forward(features, labels=None)`` -> scalar. Arguments and errors as in `flow_alignment_loss`, and for alignment "anchored" also
    ``anchor``, ``length_weight`` and ``length_delta`` of `anchored_flow_loss`. The state holds ``shift`` (D,), a row close to the mean of the centres
    or the anchor, in float32 so that subtracting it from float32 features is exact; ``shifted_centers`` (C, D), float64;
    ``shifted_anchor`` (D,), float64, of "anchored"; and ``groups`` (C,) if given. All but ``groups`` are buffers: averaging of modules
    (EMA, SWA) or broadcasting of buffers must not change its integers.
    """

    shift: Tensor
    shifted_centers: Tensor
    shifted_anchor: Tensor | None
    groups: Tensor | None
    pairs: Tensor
    _rows: Tensor
    _prepared_of: tuple[Any, ...]

    def __init__(
        self,
        centers: Tensor,
        *,
        alignment: str = "global",
        metric: str = "cosine",
        backend: str = "auto",
        eps: float = 1e-8,
        precision: str = "highest",
        groups: Tensor | None = None,
        anchor: Tensor | None = None,
        length_weight: float = 0.0,
        length_delta: float | None = None,
    ) -> None:
        super().__init__()
        self.options = check_options(alignment, metric, backend, eps, precision, groups, length_weight, length_delta)
        check_centers(centers, 2 if anchor is None else 1)
        if anchor is not None:
            if alignment != "anchored":
                raise InputError(f"alignment must be 'anchored' if anchor is given, got {alignment!r}")
            check_anchor(anchor, centers)
        # A module created in inference mode must still be usable for training.
        with torch.inference_mode(False), torch.no_grad():
            pairs = pairs_of(centers, groups).number
            constants = prepare(centers, alignment, anchor)
            self.register_buffer("shift", constants.shift)
            self.register_buffer("shifted_centers", constants.shifted)
            self.register_buffer("shifted_anchor", constants.anchor)
            self.groups = None if groups is None else groups.clone().contiguous()
            # Derived from the above. `pairs` is copied, because it may be the tensor cached by `_count_pairs`.
            self._rows = constants.rows
            self.pairs = torch.as_tensor(pairs, device=centers.device).clone()
        self._prepared_of = self._versions()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.groups is not None:
            # A copy, because averaging writes into the tensors of a state and would truncate the integers.
            destination[f"{prefix}groups"] = self.groups.clone()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        key = f"{prefix}groups"
        others = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing, unexpected, errors)
        with torch.inference_mode(False), torch.no_grad():
            self.shift, self.shifted_centers = _lasting(self.shift.float()), _lasting(self.shifted_centers.double())
            if self.shifted_anchor is not None:
                self.shifted_anchor = _lasting(self.shifted_anchor.double())
            self._rows = self._prepared_rows()
            if self.groups is None or key not in state_dict:
                if strict and key in state_dict:
                    unexpected.append(key)
                elif strict and self.groups is not None:
                    missing.append(key)
            else:
                self.groups = _whole(state_dict[key], self.groups).to(self.shift.device)
                self.pairs = count_pairs(self.groups)
                if not self.pairs.is_meta and self.pairs == 0:
                    raise InputError("the loaded groups must hold at least two classes, got one: no flow is left")
        self._prepared_of = self._versions()

    def _apply(self, fn: Any, recurse: bool = True) -> FlowAlignmentLoss:
        """Moves to another device, but ignores changes of dtype such as ``half()``, because the constants need their precision."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            changed: Tensor = fn(tensor)
            return _lasting(changed if changed.dtype == tensor.dtype else tensor.to(changed.device))

        with torch.inference_mode(False):
            super()._apply(keep_dtype, recurse)
            self._rows, self.pairs = keep_dtype(self._rows), keep_dtype(self.pairs)
            self.groups = None if self.groups is None else keep_dtype(self.groups)
        self._prepared_of = self._versions()
        return self

    def _versions(self) -> tuple[Any, ...]:
        origins = (self.shifted_centers, self.shifted_anchor, self.groups)
        return tuple(_version(tensor) for tensor in origins if tensor is not None)

    def _prepared_rows(self) -> Tensor:
        return rows_of(self.shifted_centers, self.options.alignment, self.shifted_anchor).float()

    def _constants(self) -> tuple[Constants, Pairs]:
        """Constants and pairs, recomputed if the tensors they derive from were written to (averaging), replaced for a call
        (`torch.func.functional_call`) or copied in inference mode."""
        rows, pairs = self._rows, self.pairs
        if not torch.compiler.is_compiling() and self._versions() != self._prepared_of:
            with torch.inference_mode(False), torch.no_grad():
                self.shift, self.shifted_centers = _lasting(self.shift), _lasting(self.shifted_centers)
                if self.shifted_anchor is not None:
                    self.shifted_anchor = _lasting(self.shifted_anchor)
                rows = self._prepared_rows()
                if self.groups is not None:
                    self.groups = _lasting(self.groups)
                    pairs = count_pairs(self.groups)
            if not torch._C._are_functorch_transforms_active():
                self._rows, self.pairs, self._prepared_of = rows, pairs, self._versions()
        classes = self.shifted_centers.shape[0]
        count = pairs if self.groups is not None else classes * (classes - 1)
        constants = Constants(self.shift, self.shifted_centers, rows, self.shifted_anchor)
        return constants, Pairs(self.groups, count)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        constants, pairs = self._constants()
        return evaluate(features, labels, constants, self.options, pairs)

    def extra_repr(self) -> str:
        classes, dim = self.shifted_centers.shape
        told = self.options._asdict()
        length_weight, length_delta = told.pop("weight"), told.pop("delta")
        if self.options.alignment == "anchored":
            told["length_weight"] = length_weight
            told["length_delta"] = None if length_delta == math.inf else length_delta
        options = ", ".join(f"{name}={value!r}" for name, value in told.items())
        return f"classes={classes}, dim={dim}, {options}"


def _version(tensor: Tensor) -> tuple[int, int, int]:
    """Identifies a tensor, its storage and its version, which changes with every write (except for inference tensors)."""
    address = 0
    if type(tensor) is Tensor:
        with contextlib.suppress(RuntimeError):  # raised by wrapper tensors inside torch.func
            address = tensor.data_ptr()
    return id(tensor), address, -1 if tensor.is_inference() else tensor._version


def _lasting(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy that autograd can save if it was created in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _whole(loaded: Any, groups: Tensor) -> Tensor:
    """Loaded groups as int64, even if averaging of states made them floats. Raises ``InputError`` if they don't fit or aren't integers."""
    if not isinstance(loaded, Tensor) or loaded.shape != groups.shape:
        got = tuple(loaded.shape) if isinstance(loaded, Tensor) else kind_of(loaded)
        raise InputError(f"groups in the state must be a tensor {tuple(groups.shape)}, got {got}")
    if loaded.is_floating_point() and not loaded.is_meta:
        rounded = loaded.double().round()
        if not ((loaded - rounded).abs() < 1e-2).all():
            raise InputError(
                "groups in the state must be whole numbers, got others, perhaps averages of losses with different groups"
            )
        return rounded.long()
    return loaded.detach().long().clone()
