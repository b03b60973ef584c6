"""What a bundle says of itself: what it is, how to use it, how accurate it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..backbones.record import is_recorded_as
from ..backbones.shipped import SHIPPED
from ..version import __version__


def accuracy_text(config: Mapping[str, Any]) -> str:
    """One line: what was measured of this bundle, and apart from that what is known of its classifier alone."""
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
    """The page in the file's header: what the bundle is, how to use it, how accurate it is."""
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
        'print(bundle.classify("photo.jpg"))  # [("name of a class", probability), …], the likeliest first',
        "```",
        "",
        "Or `sfm-fast classify this.safetensors photo.jpg`. The training data is not needed, and not inside.",
        "",
        f"Photos go through the backbone `{psi['name']}` ({psi['input_size']} px, {psi['num_features']} features, weights `{psi['fingerprint']}`). "
        + _weights(psi["name"], has_weights),
        _how(config),
        "",
        accuracy_text(config),
        "It knows these classes and nothing else: a photo of anything else gets one of their names too, often with a high probability.",
        "",
    ]
    return "\n".join([*lines, f"Made by sfm_fast {__version__}.", ""])


def _weights(name: str, inside: bool) -> str:
    if inside:
        return "Its weights are inside."
    source = "they come with the package" if name in SHIPPED else "timm downloads them"
    return f"Its weights are not inside: {source}; if it was made with a local file of weights, give that as `checkpoint=`."


def _how(config: Mapping[str, Any]) -> str:
    phi, made = config["distilling_backbone"], config["made"].get("projector") or {}
    trained = f"The classifier was trained on the full data with `{phi['name']}`"
    if is_recorded_as(phi, config["evaluating_backbone"]):
        return trained + "."
    joined = "folded into it" if config["folded"] else "between the two"
    blends = ", half of them blends of two," if made.get("blends") else ""
    return f"{trained}; a projector fitted on views of the synthetic images alone{blends} is {joined}."
