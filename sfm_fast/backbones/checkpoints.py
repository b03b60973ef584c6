"""Reads weights from files without running code, loads them into a model, and computes their fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import re
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import read_safetensors

_HEAD_PREFIXES = ("head.", "fc.", "classifier.", "head_dist.")
_MOCO_V3 = "base_encoder."  # next to "momentum_encoder." and "predictor."; main_moco.py of facebookresearch/moco-v3
_WRAPPERS = ("module.", _MOCO_V3, "backbone.", "model.", "encoder.")
# Words in the names of a second network that isn't the one to use: DINO's student, momentum encoders, averages.
_SECOND = {"student", "momentum", "k", "ema"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DEEPEST = 32  # nested modules


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors in a .safetensors file, or in a torch file read with ``weights_only=True`` (no code is run), by dotted names.

    A torch file may hold them in nested dictionaries and in whole modules; other objects are ignored.
    """
    if str(path).lower().endswith(".safetensors") or _kind(path) == "safetensors":
        return read_safetensors(path)[0]
    state = dict(_tensors(_load(path)))
    if not state:
        raise InputError(f"checkpoint {path}: holds no weights")
    return state


def _kind(path: str | os.PathLike[str]) -> str:
    """The file format by the first bytes. Raises ``InputError`` for files that are commonly mistaken for weights."""
    if os.path.isdir(path):
        raise InputError(f"checkpoint {path}: is a folder; give the file of weights in it")
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"checkpoint {path}: is a git-lfs pointer, not the weights; get them with `git lfs pull`")
    if start.lstrip()[:1] == b"<":
        raise InputError(f"checkpoint {path}: is a web page, not weights; the download failed")
    if start.lstrip()[:1] == b"{":
        raise InputError(
            f"checkpoint {path}: is JSON, not weights; if it is an index, give one of the files that it lists"
        )
    return "safetensors" if start[8:10] in (b'{"', b"{}") else "torch"


class _Inert:
    """Placeholder for an object of a class that isn't torch's; it does nothing."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Table:
    """Placeholder that is an OrderedDict, into which torch can load an object's attributes."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
        return OrderedDict[Any, Any]()


def _load(path: str | os.PathLike[str]) -> Any:
    """The file's contents, read without running any code, with placeholders for objects such as options, NumPy scalars and modules."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise InputError(
                        f"checkpoint {path}: must hold weights (model.state_dict()), got a TorchScript program"
                    )
        with contextlib.suppress(pickle.UnpicklingError):
            return torch.load(path, map_location="cpu", weights_only=True)
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        tables: list[Any] = [(_Inert if name.startswith("numpy") else _Table, name) for name in others]
        with contextlib.suppress(Exception), torch.serialization.safe_globals(tables):
            return torch.load(path, map_location="cpu", weights_only=True)
        with torch.serialization.safe_globals([(_Inert, name) for name in others]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # damaged pickles raise many exceptions; torch's messages advise to run the file's code
        raise InputError(f"checkpoint {path}: damaged, or not only weights ({type(error).__name__})") from error


def _tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict) and depth < _DEEPEST:
        for key, inside in value.items():
            yield from _tensors(inside, f"{name}.{key}" if name else str(key), depth + 1)
        for part in ("_parameters", "_buffers", "_modules"):  # of a whole module
            yield from _tensors(getattr(value, part, None), name, depth + 1)


def model_options(state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments for timm's model that follow from the origin of ``state`` instead of its shapes.

    All vision transformers of MoCo v3 have 12 heads (its vits.py), but timm's small one has 6: the weights fit both, with
    different features.
    """
    widths = {len(value) for key, value in state.items() if f".{key}".endswith(f".{_MOCO_V3}blocks.0.norm1.weight")}
    # Other packages use this name too; MoCo v3's release also has a momentum encoder, and transformers of two sizes.
    moco_v3 = any(".momentum_encoder." in f".{key}" for key in state) and widths and widths <= {384, 768}
    return {"num_heads": 12} if moco_v3 else {}


def load_weights(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load ``state``, read from the file ``path``, into ``model``: all weights or none.

    Wrappers' prefixes are removed, and a classifier that the model lacks is left out. If keys or shapes differ, timm's conversion
    for this kind of model is tried, for key names of original releases and position embeddings of another input size. Raises
    ``InputError`` if the weights don't fit.
    """
    expected = model.state_dict()
    state = _unwrap(state, expected.keys(), path)
    if not _fits(_without_head(state, expected), expected):
        state = _convert(model, state)
    state = _without_head(state, expected)
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise InputError(
            f"checkpoint {path} doesn't fit the backbone: missing {missing[:3]} ({len(missing)}), unknown {extra[:3]} ({len(extra)})"
        )
    for key, value in state.items():
        plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
        if not plain or (expected[key].is_floating_point() and value.dtype not in _FLOATS):
            got = "no values" if value.is_meta else f"{value.dtype}, {value.layout}"
            raise InputError(f"checkpoint {path}: {key} must be a plain float32, float16 or bfloat16 tensor, got {got}")
        if value.shape != expected[key].shape:
            raise InputError(
                f"checkpoint {path}: {key} must be {tuple(expected[key].shape)} as in the backbone, got {tuple(value.shape)}"
            )
    model.load_state_dict(state)


def fingerprint(model: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over names, dtypes and bytes of the state, in sorted order."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _fits(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(state[key].shape == expected[key].shape for key in state)


def _without_head(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key in expected or not key.startswith(_HEAD_PREFIXES)}


def _unwrap(state: dict[str, Tensor], expected: Iterable[str], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The part of ``state`` whose names are a common prefix and the model's names, without it; else ``state`` without known wrappers' prefixes."""
    wanted = set(expected)
    prefix = _find_prefix(state, wanted, path)
    if prefix is not None:
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    while not wanted & state.keys():
        prefix = next((p for p in _WRAPPERS if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state
        state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    return state


def _find_prefix(state: dict[str, Tensor], wanted: set[str], path: str | os.PathLike[str]) -> str | None:
    """The prefix of most of the model's names; None if at least half of them are missing. Raises ``InputError`` if two networks fit."""
    counts: Counter[str] = Counter()
    for key in state:
        for place in [0, *(match.end() for match in re.finditer(r"\.", key))]:
            if key[place:] in wanted:
                counts[key[:place]] += 1
    most = max(counts.values(), default=0)
    if 2 * most < len(wanted):
        return None
    best = [prefix for prefix, count in counts.items() if count == most]
    if len(best) > 1:
        second = {prefix: len(_SECOND & set(re.split(r"[._]", prefix))) for prefix in best}
        best = [prefix for prefix in best if second[prefix] == min(second.values())]
    first = best[0]
    for other in best[1:]:
        if any(not torch.equal(state[first + key], state[other + key]) for key in wanted if first + key in state):
            raise InputError(
                f"checkpoint {path}: holds {len(best)} networks that fit, {', '.join(map(repr, best))}; save only the one to use"
            )
    return first


def _convert(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` converted by the ``checkpoint_filter_fn`` of timm's model; unchanged if there is none or it fails."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some of these functions print, but stdout may carry JSON
            return dict(convert(dict(state), model))
    except Exception:  # weights of another model: the caller reports what doesn't fit
        return state
