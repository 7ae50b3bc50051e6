"""The page is one self-contained file with all data, and works in a browser."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import needs_browser, visit
from stack import Stack

from llmc import LlmcError
from llmc.compiler.inspect.page import page_data, write_page
from llmc.compiler.inspect.record import Inspection, inspect_model
from llmc.ir.program import Miss, PassRecord
from llmc.ir.stages import Stage

USUAL = (1e-5, "silu")


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    recorded = inspect_model(Stack(USUAL, USUAL, (1e-6, "gelu")), until=Stage.CANONICAL, details=True)
    last = recorded.steps[-1]
    # A reason that would end the data's script element early, and misses that this model does not cause.
    misses = (Miss("</script><b>a reason & more", "node_1", "layers.0"), *[Miss("another", f"n{i}") for i in range(30)])
    object.__setattr__(last, "record", PassRecord("Reach(canonical)", 0, misses, 0.5, Stage.CANONICAL))
    recorded.refusal = LlmcError("IR_INVALID", "It was refused <i>here</i>.", "Fix it.")
    return recorded


@pytest.fixture(scope="module")
def page(inspection: Inspection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(inspection, path)
    return path


class Parsed(html.parser.HTMLParser):
    """Parse a document into attributes of all elements and texts of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def test_all_parts_and_data_are_inline(page: Path, inspection: Inspection) -> None:
    parsed = Parsed(page.read_text())
    assert parsed.open == []
    assert json.loads(parsed.scripts[0]) == json.loads(json.dumps(page_data(inspection)))
    assert len(parsed.scripts) == 2
    assert not re.search(r"/\*\{\w+\}\*/", page.read_text()), "a placeholder was not replaced"


def test_nothing_is_loaded_from_elsewhere(page: Path) -> None:
    text = page.read_text()
    assert not [a for a in Parsed(text).attributes if a[1] in ("src", "href", "srcset", "action")]
    urls = set(re.findall(r"\w+://[^\s\"'<)]*", text))
    assert urls == {"http://www.w3.org/2000/svg"}, "only the name of the SVG namespace is allowed"
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", text)


def test_data_has_every_step_and_each_distinct_view_once(inspection: Inspection) -> None:
    data: dict[str, Any] = page_data(inspection)
    assert [section["layers"] for section in data["sections"]] == [[""], ["layers.0", "layers.1"], ["layers.2"]]
    assert [step["name"] for step in data["steps"]] == ["captured", *(s.record.name for s in inspection.steps)]
    assert len({json.dumps(view) for view in data["views"]}) == len(data["views"])
    for step, snapshot in zip(data["steps"], [inspection.captured, *(s.after for s in inspection.steps)], strict=True):
        for section, index in zip(data["sections"], step["views"], strict=True):
            assert data["views"][index]["text"] == snapshot.views[section["layers"][0]].text
    misses = data["steps"][-1]["misses"]
    assert [(m["reason"], m["count"], len(m["at"])) for m in misses] == [
        ("another", 30, 12),
        ("</script><b>a reason & more", 1, 1),
    ]


def test_a_failed_write_keeps_the_existing_file(
    inspection: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "page.html"
    target.write_text("before")

    def write_half(self: Path, text: str, encoding: str) -> None:
        with self.open("w") as file:
            file.write(text[:1000])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "write_text", write_half)
        with pytest.raises(LlmcError, match=r"OUTPUT_UNWRITABLE.*No space left"):
            write_page(inspection, target)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.html", "before")]
    write_page(inspection, target)
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() != "before"


def inside(document: str, tag: str) -> str:
    """Return the text between the first and the last `tag`."""
    return document[document.index(f"<{tag}") : document.rindex(f"</{tag}>")]


def assert_clean(document: str) -> None:
    """Check that the page shows no missing value as `undefined` or the like."""
    shown = inside(document, "header") + inside(document, "nav") + inside(document, "main")
    assert not re.search(r"\b(NaN|Infinity|null|undefined)\b", shown)


@needs_browser
def test_a_page_of_a_model_that_was_not_refused(inspection: Inspection, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(dataclasses.replace(inspection, refusal=None), page)
    document = visit(page, tmp_path / "profile")
    assert "IR_INVALID" not in document
    assert_clean(document)


@needs_browser
def test_it_opens_at_the_graph_of_the_last_step(page: Path, tmp_path: Path, inspection: Inspection) -> None:
    document = visit(page, tmp_path)
    assert "<b>IR_INVALID</b> It was refused &lt;i&gt;here&lt;/i&gt;. Fix it." in document
    nav, main = inside(document, "nav"), inside(document, "main")
    assert nav.count('class="step') == 1 + len(inspection.steps)
    assert re.findall(r'aria-current="(\w+)"', nav) == ["false"] * len(inspection.steps) + ["true"]
    assert "30× another" in main
    assert "1× &lt;/script&gt;&lt;b&gt;a reason &amp; more" in main
    assert "2 identical layers" in main
    assert_clean(document)
    drawn = sum(len(inspection.steps[-1].after.views[layer].drawing) for layer in ("", "layers.0", "layers.2"))
    assert main.count('class="box') == drawn


@needs_browser
def test_a_url_fragment_opens_the_changes_of_a_pass(page: Path, tmp_path: Path, inspection: Inspection) -> None:
    step = 1 + next(i for i, s in enumerate(inspection.steps) if s.record.name == "MatchRmsNorm")
    main = inside(visit(page, tmp_path, f"#step={step}&tab=changes"), "main")
    assert "<h2>MatchRmsNorm</h2>" in main
    assert "3 matches" in main
    gone = re.findall(r'<div class="gone">(.*?)</div>', main)
    added = re.findall(r'<div class="add">(.*?)</div>', main)
    assert any("aten.rsqrt" in line for line in gone)
    assert added
    assert all("llmc.rms_norm" in line or "=" in line for line in added)
    assert "Unchanged: outside of the layers." in main


@needs_browser
def test_search_finds_a_weight_of_a_folded_layer(page: Path, tmp_path: Path) -> None:
    document = visit(page, tmp_path, "#q=layers.1.up.weight")
    assert re.search(r'id="found"[^>]*>1 hit<', document)
    assert document.count('class="box k-linear own hit"') == 1
    nothing = visit(page, tmp_path, "#q=layers.7.up.weight")
    assert re.search(r'id="found"[^>]*>0 hits<', nothing)
