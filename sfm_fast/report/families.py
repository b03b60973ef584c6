"""timm's models worth distilling for, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .tables import text_table

HEADER = (
    "`--backbone`",
    "family",
    "features",
    "pooled",
    "input px",
    "patch px",
    "parameters",
    "mean",
    "std",
    "crop",
    "licence",
)


def family_table(rows: Iterable[dict[str, Any]]) -> str:
    """Rows of `family_rows` as a Markdown table."""

    def numbers(values: list[float]) -> str:
        """One number where the channels agree."""
        return " ".join(f"{value:.3g}" for value in (values if len(set(values)) > 1 else values[:1]))

    return text_table(
        HEADER,
        (
            (
                f"`{row['name']}`",
                row["family"],
                str(row["features"]),
                row["pooling"],
                str(row["input_size"]),
                str(row["patch_size"]),
                f"{row['parameters'] / 1e6:.1f} M",
                numbers(row["mean"]),
                numbers(row["std"]),
                f"{row['crop_pct']:g}",
                row["license"],
            )
            for row in rows
        ),
    )
