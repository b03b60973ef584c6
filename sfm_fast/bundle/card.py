"""The page and the configuration inside a bundle: what it is, how to use it, what it holds and weighs, how accurate it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbones.shipped import SHIPPED
from ..files import write_text
from ..version import __version__
from .config import VERSION
from .folder import CONFIG, FORMAT, README, TITLES, WEIGHTS

if TYPE_CHECKING:
    from .bundle import Bundle


def config_of(bundle: Bundle, dtype: str) -> dict[str, Any]:
    """bundle.json of a bundle with weights stored as ``dtype``, but for "files" and "sizes"."""
    return {
        "file_format": f"{FORMAT}/{VERSION}",
        "sfm_fast": __version__,
        "class_names": bundle.class_names,
        "distilling_backbone": bundle.phi,
        "evaluating_backbone": bundle.psi,
        "channels": bundle.channels,
        "folded": bundle.folded,
        "dtype": dtype,
        "made": bundle.made,
        "accuracy": bundle.accuracy,
    }


def write_texts(folder: Path, config: dict[str, Any], details: Mapping[str, str]) -> None:
    """Write bundle.json and README.md, with a table of sizes that includes their own; fills in ``config["sizes"]``.

    ``details`` says of each file by name what it holds.
    """
    training = _training_images(config)
    own = -1
    while True:  # the sizes have few digits, so they settle after a round or two
        sized = {name: entry["bytes"] for name, entry in config["files"].items()}
        rows = [{"what": TITLES[name], "bytes": sized[name], "detail": details[name]} for name in sized]
        rows.append({"what": "names and configuration", "bytes": max(own, 0), "detail": f"{CONFIG}, {README}"})
        rows.append({"what": "total", "bytes": max(own, 0) + sum(sized.values()), "detail": ""})
        config["sizes"] = rows + training
        text, page = json.dumps(config, indent=2, allow_nan=False) + "\n", readme(config)
        size = len(text) + len(page.encode(errors="backslashreplace"))  # as `write_text` has them; JSON is ASCII
        if size == own:
            break
        own = size
    write_text(folder / README, page)
    write_text(folder / CONFIG, text)


def _training_images(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row of the images that the classifier was trained on, where it says how many."""
    count = (config["made"].get("classifier") or {}).get("images")
    if not isinstance(count, int):
        return []
    phi, channels = config["distilling_backbone"], config["channels"]
    side = phi["input_size"]
    detail = f"{count} x {side} x {side} x {channels}, uint8, as {phi['name']} takes them"
    return [{"what": "training images (not inside)", "bytes": count * side**2 * channels, "detail": detail}]


def same_backbone(phi: Mapping[str, Any], psi: Mapping[str, Any]) -> bool:
    """Whether two ``Backbone.describe()`` tell of the same ``Backbone.identity``."""
    return all(phi[key] == psi[key] for key in ("name", "fingerprint", "input_size", "resize", "mean", "std"))


def accuracy_text(config: Mapping[str, Any]) -> str:
    """One line: what was measured of this bundle, and apart from that what is known of its classifier alone."""
    phi, psi = config["distilling_backbone"], config["evaluating_backbone"]
    classifier = config["made"].get("classifier") or {}
    tested, data = classifier.get("test_top1"), classifier.get("test_data") or "its test set"
    measured = "; ".join(
        f"{100 * found['top1']:.1f} % on {name}, {found['images']} images" for name, found in config["accuracy"].items()
    )
    if same_backbone(phi, psi) and tested is not None and not measured:
        return f"Accuracy: {100 * tested:.1f} % on {data}, measured when its classifier was trained."
    line = f"Accuracy of this bundle: {measured or 'not measured'}."
    if same_backbone(phi, psi) or tested is None:
        return line
    lower = "" if measured else "; through the projector it is lower"
    return f"{line} (Its classifier on {phi['name']}'s own features: {100 * tested:.1f} % on {data}{lower}.)"


def readme(config: Mapping[str, Any]) -> str:
    """The page inside a bundle: what it is, how to use it, what it holds."""
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
        'bundle = Bundle.load("this/folder")',
        'print(bundle.classify("photo.jpg"))  # [("name of a class", probability), …], the likeliest first',
        "```",
        "",
        "Or `sfm-fast classify this/folder photo.jpg`. The training data is not needed, and not inside.",
        "",
        f"Photos go through the backbone `{psi['name']}` ({psi['input_size']} px, {psi['num_features']} features, weights `{psi['fingerprint']}`). "
        + _weights(config),
        _how(config),
        "",
        accuracy_text(config),
        "It knows these classes and nothing else: a photo of anything else gets one of their names too, often with a high probability.",
        "",
        "| part | bytes | what |",
        "|---|--:|---|",
        # Without what the texts themselves weigh, which bundle.json knows.
        *(
            f"| {row['what']} | {row['bytes']} | {row['detail']} |"
            for row in config["sizes"]
            if row["what"] in TITLES.values()
        ),
        "",
    ]
    return "\n".join([*lines, f"Made by sfm_fast {config['sfm_fast']}; all figures and settings: `{CONFIG}`.", ""])


def _weights(config: Mapping[str, Any]) -> str:
    if WEIGHTS in config["files"]:
        return "Its weights are inside."
    source = "they come with the package" if config["evaluating_backbone"]["name"] in SHIPPED else "timm downloads them"
    return f"Its weights are not inside: {source}; if it was made with a local file of weights, give that as `checkpoint=`."


def _how(config: Mapping[str, Any]) -> str:
    phi, made = config["distilling_backbone"], config["made"].get("projector") or {}
    trained = f"The classifier was trained on the full data with `{phi['name']}`"
    if same_backbone(phi, config["evaluating_backbone"]):
        return trained + "."
    joined = "folded into it" if config["folded"] else "between the two"
    blends = ", half of them blends of two," if made.get("blends") else ""
    return f"{trained}; a projector fitted on views of the synthetic images alone{blends} is {joined}."
