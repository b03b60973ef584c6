"""Pages and figures made from benchmark results, and results that are refused: numbers against the rows they come from."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bench_results import CLAIMS, HARDWARE, imagenet, laptop, row

from sfm_fast.benchmarks.report import drawing, figures, tables
from sfm_fast.benchmarks.report.page import page_text, write_all, write_page
from sfm_fast.benchmarks.rows import Row, read_claims, read_result
from sfm_fast.errors import InputError

pytest.importorskip("matplotlib")


class Balance(HTMLParser):
    """Fails where a tag is closed that isn't the innermost open one."""

    VOID = ("meta", "br", "img", "link", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.ids += [value or "" for name, value in attributes if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return page_text([laptop(), imagenet()], CLAIMS)


def test_page_is_well_formed_and_self_contained(page: str, tmp_path: Path) -> None:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert not {"script", "link", "iframe", "i", "b"} & set(parser.seen)  # i and b would come from names not escaped
    assert len(parser.ids) == len(set(parser.ids))
    saved = [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for text in (page, *saved):
        assert set(re.findall(r"https?://[^\"'\s<]+", text)) <= names
        assert set(re.findall(r"url\((.)", text)) <= {"#"}
        assert not re.search(r"@import|<script|src=|javascript:", text)
    assert len(saved) == parser.seen.count("svg") == parser.seen.count("figure")
    write_page(tmp_path / "page.html", [laptop(), imagenet()], CLAIMS)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page  # equal input, equal bytes


def test_page_has_every_figure_with_its_hardware(page: str) -> None:
    captions = [unescape(caption) for caption in re.findall(r"<figcaption>(.*?)</figcaption>", page)]
    starts = (
        "Measured: time (above) and memory (below) of the losses, forward + backward, against the number of classes C; D = 384, ipc = 1.",
        "Measured: time (above) and memory (below) of the losses, forward + backward, against the feature dimension D; C = 1000, ipc = 1.",
        "Measured: time (above) and memory (below) of one distillation step. Held fixed against number of classes C: D = 192, ipc = 1;",
        "Measured: one distillation step, laptop.",
        "Predicted, not measured: peak memory of one step, imagenet-100,",
    )  # fmt: skip
    assert len(captions) == len(starts)
    for caption, start in zip(captions, starts, strict=True):
        assert caption.startswith(start)
        assert HARDWARE in caption
        assert "torch 2.99.0" in caption
        assert "3 threads" in caption
    assert all("median" in caption and "20th to 80th" in caption for caption in captions[:4])
    assert ["float32" in captions[0], "float32" in captions[2], "bfloat16" in captions[4]] == [True] * 3
    assert "Not drawn: KeOps | <b> (wrong result: gradient off by 3e-1)" in captions[0]
    assert "Testing GPU 200 (host: " in captions[4]


def test_page_says_what_failed_what_was_lost_and_how_to_repeat_it(page: str) -> None:
    words = " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())
    for part in (
        "wrong result: gradient off by 3e-1", "unsupported: not built", "✕ out of memory", "10 (met)", "-0.5 (missed)",
        "3.1x (2.9–3.3)", "1.75x (1.61–2.00)", "51.89 GB, 9.2x", f"laptop on {HARDWARE}", "imagenet-100, predicted on Testing GPU 200",
        "Predicted, not measured: nothing of this result was run.", "sfm-fast bench --preset imagenet-100 --predict",
        "sfm-fast bench --preset laptop", "abc1234",
    ):  # fmt: skip
        assert part in words, part
    # The plots hold text that can be searched, and the bars their factors.
    assert "7.3 MB" in words
    assert "180 ms, 9.0x" in words


def test_curves_are_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "line_grid", lambda panels, styles, salt: drawn.append(panels) or "")
    result = laptop()
    styles = drawing.styles_of([result])
    figures._losses("classes")(result, styles, "")
    figures._scaling(result, styles, "")
    (times_, sizes), (step_times, _) = drawn
    assert [panel.title for panel in times_] == ["global alignment", "pair alignment"]
    eager = next(series for series in times_[0].series if series.name == "eager")
    medians = [3.1 * classes * 384 * 1e-6 for classes in (10, 100, 1000)]
    expected = [(c, m, 0.9 * m, 1.2 * m) for c, m in zip((10, 100, 1000), medians, strict=True)]
    assert eager.points == [pytest.approx(point) for point in expected]
    large = next(series for series in sizes[1].series if series.name == "C x C x D")
    assert [(x, y) for x, y, *_ in large.points] == [(10, pytest.approx(0.1536)), (100, pytest.approx(15.36))]
    assert large.out_of_memory == [1000]
    # Columns: classes, ipc, views and dimension; LGM keeps its ten views but where views are what varies.
    lgm = [next(series for series in panel.series if series.name == "LGM frozen") for panel in step_times]
    assert [[x for x, *_ in series.points] for series in lgm] == [[10, 20, 40], [1, 2, 5], [10, 1, 5], [192, 384]]
    assert lgm[0].out_of_memory == [80]


def test_predicted_scaling_is_drawn_as_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "line_grid", lambda panels, styles, salt: drawn.append(panels) or "")
    rows = []
    for varied, values in (("classes", (10, 100)), ("ipc", (1, 5))):
        for value in values:
            case = {"classes": 10, "ipc": 1, "dim": 768, "varied": varied, "value": value} | {varied: value}
            size = {"peak_bytes": value * 10**9, "absolute_bytes": value * 10**9 + 7, "status": "predicted"}
            rows.append(row("scaling", f"{varied} {value}", "LGM frozen", "step", None, views=10, **size, **case))
    result = replace(imagenet(), rows=rows)
    (found,) = figures.drawings(result, drawing.styles_of([result]), "")
    assert found.caption.startswith("Predicted, not measured: memory of one distillation step.")
    ((classes, ipc),) = drawn[0]
    assert [(series.predicted, series.points) for series in classes.series] == [
        (True, [(10, 10, 10, 10), (100, 100, 100, 100)])
    ]
    assert classes.ylabel == "memory, GB"
    assert [x for x, *_ in ipc.series[0].points] == [1, 5]


def test_one_contender_looks_the_same_everywhere_and_like_no_other() -> None:
    looks = drawing.styles_of([laptop(), imagenet()])
    losses = {looks[name] for name in ("sfm_fast cpu", "sfm_fast torch", "eager", "C x C x D", "KeOps | <b>")}
    assert len(losses) == 5
    assert looks == drawing.styles_of([laptop(), imagenet()])
    assert looks["LGM frozen"] != looks["SFM one-shot"]


@pytest.mark.parametrize("suite", ["losses", "images", "step", "loading", "scaling", "startup"])
def test_a_page_of_one_suite(suite: str) -> None:
    result = laptop()
    result.rows = [row for row in result.rows if row.suite == suite]
    parser = Balance()
    parser.feed(page_text([result]))
    assert parser.open == []
    assert parser.seen.count("figure") == {"losses": 2, "step": 1, "scaling": 1}.get(suite, 0)


@pytest.mark.parametrize("rows", [[], [row("losses", "a", "sfm_fast cpu", "both", None, status="out of memory")]])
def test_a_result_without_measurements_says_so(rows: list[Row], tmp_path: Path) -> None:
    result = replace(laptop(), rows=rows)
    assert "This result has no measured row" in page_text([result])
    assert "This result has no measured row" in tables.markdown(result)
    write_all(tmp_path, "empty", result)
    assert {path.name for path in tmp_path.iterdir()} == {"empty.md", "empty.csv", "empty.html"}


def test_everything_out_of_memory_but_one_point_can_be_drawn() -> None:
    """Ranges of no width, zeros that a log axis can't show, names with signs that mean something to plots and pages."""
    case = {"alignment": "pair", "classes": 10, "dim": 384, "ipc": 1}
    rows = [row("losses", "x", "sfm_fast $cpu$ & <b>", "both", 1e-5, (1, 1, 1), peak_bytes=0, **case)]
    lost = case | {"classes": 20, "status": "out of memory"}
    rows += [row("losses", "y", f"_{place}", "both", None, **lost) for place in range(12)]
    text = page_text([replace(laptop(), rows=rows)])
    assert text.count("<figure>") == 1  # nothing differs in dimension
    assert "sfm_fast $cpu$ &amp; &lt;b&gt;" in text
    assert "<b>" not in text
    assert "can&#x27;t show: sfm_fast $cpu$ &amp; &lt;b&gt;." in text
    parser = Balance()
    parser.feed(text)
    assert parser.open == []


def broken(**changes: Any) -> dict[str, Any]:
    result = laptop().to_json()
    for key, value in changes.items():
        if key in result:
            result[key] = value
        else:
            result["rows"][0][key] = value
    return result


@pytest.mark.parametrize(
    ("result", "named"),
    [
        ([], "damaged benchmark result"),
        (broken(format="other"), "key 'format'"),
        (broken(preset=None), "preset is None"),
        (broken(environment="a laptop"), "environment is 'a laptop'"),
        (broken(rows={}), "rows is {}"),
        (broken(rows=[3]), r"rows\[0\] is 3"),
        (broken(interval="guessed"), "interval is 'guessed'"),
        (broken(mood="good"), r"rows\[0\]: 'mood' is no part of a row"),
        (broken(ours="yes"), r"rows\[0\].*ours"),
        (broken(contender=None), r"rows\[0\].*contender"),
        (broken(median=None), r"rows\[0\].*median"),
        (broken(median=float("nan")), "NaN is no valid number"),
        (broken(p80="fast"), r"rows\[0\].*p80"),
        (broken(peak_bytes=-1), r"rows\[0\].*peak_bytes"),
        (broken(dtype=["float32"]), r"rows\[0\].*dtype"),
        (broken(ratio={"median": 1}), r"rows\[0\].*ratio"),
        (broken(by_category=[1]), r"rows\[0\].*by_category"),
    ],
)
def test_malformed_results_are_refused(result: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(result))
    with pytest.raises(InputError, match=rf"damaged\.json: .*{named}"):
        read_result(path)


def test_files_that_are_no_results_are_named(tmp_path: Path) -> None:
    path = tmp_path / "torn.json"
    with pytest.raises(InputError, match=r"torn\.json: can't be read"):
        read_result(path)
    path.write_text('{"format": ')
    with pytest.raises(InputError, match=r"torn\.json: no JSON"):
        read_result(path)
    path.write_text(json.dumps(laptop().to_json()))
    assert read_result(path) == laptop()


@pytest.mark.parametrize(
    ("claims", "named"),
    [
        ({"rows": []}, "claims is {'rows'"),
        ([CLAIMS[0].to_json(), {"claim": "memory"}], r"claims\[1\] has no setting"),
        ([CLAIMS[0].to_json() | {"paper": [1]}], r"claims\[0\]: paper"),
        ([CLAIMS[0].to_json() | {"standard_error": "small"}], r"claims\[0\]: standard_error"),
    ],
)
def test_malformed_claims_are_refused(claims: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    path.write_text(json.dumps({"claims": [one.to_json() for one in CLAIMS]}))
    assert read_claims(path) == CLAIMS
    path.write_text(json.dumps({"claims": claims}))
    with pytest.raises(InputError, match=rf"claims\.json: damaged claims.*{named}"):
        read_claims(path)


def test_a_page_wants_results() -> None:
    for results in ([], laptop()):
        with pytest.raises(InputError, match="results: wanted a list"):
            page_text(results)  # type: ignore[arg-type]


def test_without_matplotlib_there_are_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert write_all(tmp_path, "laptop", laptop()) == tmp_path / "laptop.md"
    assert {path.name for path in tmp_path.iterdir()} == {"laptop.md", "laptop.csv"}
