"""The description in a bundle: what it contains, how to use it, and its accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..backbones.record import is_recorded_as
from ..backbones.shipped import SHIPPED
from ..version import __version__


def accuracy_text(config: Mapping[str, Any]) -> str:
    """One line: the measured accuracy of this bundle, or else what is known about its classifier alone."""
    phi, psi = config["distilling_backbone"], config["evaluating_backbone"]
    classifier = config["made"].get("classifier") or {}
    tested, data = classifier.get("test_top1"), classifier.get("test_data") or "its test set"
    measured = "; ".join(
        f"{100 * one['top1']:.1f} % on {name}, {one['images']} images" for name, one in config["accuracy"].items()
    )
    if is_recorded_as(phi, psi) and tested is not None and not measured:
        return f"Accuracy: {100 * tested:.1f} % on {data}, measured when its classifier was trained."
    line = f"Accuracy of this bundle: {measured or 'not measured'}."
    if is_recorded_as(phi, psi) or tested is None:
        return line
    lower = "" if measured else "; through the projector it is lower"
    return f"{line} (Its classifier on {phi['name']}'s own features: {100 * tested:.1f} % on {data}{lower}.)"


def readme(config: Mapping[str, Any], has_weights: bool) -> str:
    """The text in the file's header: what the bundle contains, how to use it, and its accuracy."""
    names, psi = config["class_names"], config["evaluating_backbone"]
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    lines = [
        f"# A classifier of {len(names)} classes",
        "",
        f"Classes: {shown}.",
        "",
        "```python",
        "from sfm_fast import Bundle",
        "",
        'bundle = Bundle.load("this.safetensors")',
        'print(bundle.classify("photo.jpg"))  # [("name of a class", probability), …], the most probable first',
        "```",
        "",
        "Or `sfm-fast classify this.safetensors photo.jpg`. The training data is not needed and not included.",
        "",
        f"The features of photos come from the backbone `{psi['name']}` ({psi['input_size']} px, {psi['num_features']} features, weights `{psi['fingerprint']}`). "
        + _weights(psi["name"], has_weights),
        _how(config),
        "",
        accuracy_text(config),
        "It knows only these classes: a photo of anything else also gets one of their names, often with a high probability.",
        "",
    ]
    return "\n".join([*lines, f"Made by sfm_fast {__version__}.", ""])


def _weights(name: str, inside: bool) -> str:
    if inside:
        return "Its weights are included."
    source = "the package contains them" if name in SHIPPED else "timm downloads them"
    return f"Its weights are not included: {source}. If it was made with a local file of weights, pass that as `checkpoint=`."


def _how(config: Mapping[str, Any]) -> str:
    phi, made = config["distilling_backbone"], config["made"].get("projector") or {}
    trained = f"The classifier was trained on the full data with `{phi['name']}`"
    if is_recorded_as(phi, config["evaluating_backbone"]):
        return trained + "."
    joined = "folded into it" if config["folded"] else "between the two"
    blends = ", half of them blends of two images," if made.get("blends") else ""
    return f"{trained}; a projector fitted only on views of the synthetic images{blends} is {joined}."
