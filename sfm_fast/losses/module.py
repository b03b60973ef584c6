"""The flow-alignment loss as a module that keeps what it prepared from the centres."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_centers, kind_of
from ..errors import InputError
from ..ops.pair_alignment import Pairs
from ..reference import flow_alignment as reference
from ..reference.pair_alignment import count_pairs
from .evaluate import (
    Constants,
    check_options,
    evaluate,
    pairs_of,
    prepare,
)


class FlowAlignmentLoss(nn.Module):
    """`flow_alignment_loss` with the constants of ``centers`` prepared once and kept in the state_dict.

    ``forward(features, labels=None)`` -> scalar. Arguments and errors as in `flow_alignment_loss`. The state holds
    ``shift`` (D,), one row close to the mean of the centres, in float32 so that float32 features subtract exactly;
    ``shifted_centers`` (C, D), float64; and ``groups`` (C,) where given. The first two are buffers; ``groups`` is none, so that no
    averaging of modules (EMA, SWA) or broadcast of buffers touches whole numbers.
    """

    shift: Tensor
    shifted_centers: Tensor
    groups: Tensor | None
    pairs: Tensor
    _centred: Tensor
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
    ) -> None:
        super().__init__()
        self.options = check_options(alignment, metric, backend, eps, precision, groups)
        check_centers(centers)
        # Even where the module is made in inference mode: training with it must stay possible.
        with torch.inference_mode(False), torch.no_grad():
            pairs = pairs_of(centers, groups).number
            constants = prepare(centers)
            self.register_buffer("shift", constants.shift)
            self.register_buffer("shifted_centers", constants.shifted)
            self.groups = None if groups is None else groups.clone().contiguous()
            # Derived from the above. A copy: `pairs` may be what `_count_pairs` remembers.
            self._centred = constants.centred
            self.pairs = torch.as_tensor(pairs, device=centers.device).clone()
        self._prepared_of = self._versions()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.groups is not None:
            # A copy: averaging writes into the tensors of a state, and would cut whole numbers down.
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
            self._centred = reference.centre_rows(self.shifted_centers).float()
            if self.groups is None or key not in state_dict:
                if strict and key in state_dict:
                    unexpected.append(key)
                elif strict and self.groups is not None:
                    missing.append(key)
            else:
                self.groups = _whole(state_dict[key], self.groups).to(self.shift.device)
                self.pairs = count_pairs(self.groups)
                if not self.pairs.is_meta and self.pairs == 0:
                    raise InputError("the loaded groups put all centers into one class: no flow is left")
        self._prepared_of = self._versions()

    def _apply(self, fn: Any, recurse: bool = True) -> FlowAlignmentLoss:
        """Follows ``to(device)`` but not ``half()`` and its like: the constants keep the precision that the result promises."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            changed: Tensor = fn(tensor)
            return _lasting(changed if changed.dtype == tensor.dtype else tensor.to(changed.device))

        with torch.inference_mode(False):
            super()._apply(keep_dtype, recurse)
            self._centred, self.pairs = keep_dtype(self._centred), keep_dtype(self.pairs)
            self.groups = None if self.groups is None else keep_dtype(self.groups)
        self._prepared_of = self._versions()
        return self

    def _versions(self) -> tuple[Any, ...]:
        return (*_version(self.shifted_centers), *(() if self.groups is None else _version(self.groups)))

    def _constants(self) -> tuple[Constants, Pairs]:
        """Constants and number of pairs: anew where the tensors they come from were written to (averaging), or are others for the time
        of a call (`torch.func.functional_call`), or were copied in inference mode."""
        centred, pairs = self._centred, self.pairs
        if not torch.compiler.is_compiling() and self._versions() != self._prepared_of:
            with torch.inference_mode(False), torch.no_grad():
                self.shift, self.shifted_centers = _lasting(self.shift), _lasting(self.shifted_centers)
                centred = reference.centre_rows(self.shifted_centers).float()
                if self.groups is not None:
                    self.groups = _lasting(self.groups)
                    pairs = count_pairs(self.groups)
            if not torch._C._are_functorch_transforms_active():
                self._centred, self.pairs, self._prepared_of = centred, pairs, self._versions()
        classes = self.shifted_centers.shape[0]
        count = pairs if self.groups is not None else classes * (classes - 1)
        return Constants(self.shift, self.shifted_centers, centred), Pairs(self.groups, count)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        constants, pairs = self._constants()
        return evaluate(features, labels, constants, self.options, pairs)

    def extra_repr(self) -> str:
        classes, dim = self.shifted_centers.shape
        options = ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())
        return f"classes={classes}, dim={dim}, {options}"


def _version(tensor: Tensor) -> tuple[int, int, int]:
    """Another one after a write to ``tensor``, and for another tensor or storage; writes to inference tensors aren't counted."""
    address = 0
    if type(tensor) is Tensor:
        with contextlib.suppress(RuntimeError):  # of tensors that stand for others inside torch.func
            address = tensor.data_ptr()
    return id(tensor), address, -1 if tensor.is_inference() else tensor._version


def _lasting(tensor: Tensor) -> Tensor:
    """A tensor that autograd may save, also where ``tensor`` was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _whole(loaded: Any, groups: Tensor) -> Tensor:
    """Loaded groups as int64, also where an average of states made them floats. Raises ``InputError``."""
    if not isinstance(loaded, Tensor) or loaded.shape != groups.shape:
        got = tuple(loaded.shape) if isinstance(loaded, Tensor) else kind_of(loaded)
        raise InputError(f"groups in the state must be a tensor {tuple(groups.shape)}, got {got}")
    if loaded.is_floating_point() and not loaded.is_meta:
        rounded = loaded.double().round()
        if not ((loaded - rounded).abs() < 1e-2).all():
            raise InputError("groups in the state aren't whole numbers: the average of losses with other groups?")
        return rounded.long()
    return loaded.detach().long().clone()
