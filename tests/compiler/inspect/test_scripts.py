"""The page's diff and layout algorithms on random cases, in a browser."""

from __future__ import annotations

from pathlib import Path

from browser import needs_browser, visit

import llmc

SCRIPTS = Path(llmc.__file__).parent / "compiler" / "inspect"

# A seeded generator, so that failures are reproducible.
RANDOM = "let seed = 7; const random = (n) => (seed = (seed * 16807) % 2147483647) % n;"


def run(name: str, check: str, folder: Path) -> None:
    """Load a script, run `check`, and assert that it finishes."""
    page = folder / "check.html"
    page.write_text(
        f"<body><script>{(SCRIPTS / name).read_text()}</script><script>{RANDOM}\n"
        f"function check(ok, what) {{ if (!ok) throw new Error(what); }}\n{check}\n"
        'document.body.textContent = "checked";</script>'
    )
    assert "checked" in visit(page, folder / "profile")


@needs_browser
def test_a_diff_contains_both_texts_with_the_fewest_changes(tmp_path: Path) -> None:
    check = """
    const plain = (rows, side) => rows.map((row) => row[side]).filter((line) => line !== null).join("");
    function longestCommon(a, b) {
      if (!a.length || !b.length) return 0;
      if (a[0] === b[0]) return 1 + longestCommon(a.slice(1), b.slice(1));
      return Math.max(longestCommon(a.slice(1), b), longestCommon(a, b.slice(1)));
    }
    for (let i = 0; i < 400; i++) {
      const [a, b] = [0, 1].map(() => Array.from({ length: random(8) }, () => "abcd"[random(4)]));
      const rows = diffLines(a, b);
      check(plain(rows, 0) === a.join("") && plain(rows, 1) === b.join(""), `${a} ${b}: a side is incomplete`);
      const same = rows.filter(([x, y]) => x === y).length;
      check(same === longestCommon(a, b), `${a} ${b}: ${same} kept`);
      const unfolded = foldRows(rows, 1).flatMap((row) => row.folded ?? [row]);
      check(JSON.stringify(unfolded) === JSON.stringify(rows), `${a} ${b}: folding loses rows`);
    }
    const far = foldRows([["a", "a"], ["b", "b"], ["c", "c"], ["d", "x"]], 1);
    check(far[0].folded.length === 2 && far.length === 3, "what is far is folded");
    """
    run("diff.js", check, tmp_path)


@needs_browser
def test_boxes_do_not_overlap_and_edges_go_down(tmp_path: Path) -> None:
    check = """
    for (let i = 0; i < 60; i++) {
      const boxes = Array.from({ length: 1 + random(40) }, (_, at) => {
        const inputs = at ? [...new Set(Array.from({ length: random(4) }, () => random(at)))] : [];
        const external = inputs.length === 0 && random(2) === 0;
        return { inputs, external, width: 40 + random(200), height: 20 + random(60) };
      });
      const plan = layout(boxes);
      const sides = boxes.map((box, at) => ({ left: plan.at[at].x - box.width / 2, right: plan.at[at].x + box.width / 2,
        top: plan.at[at].y - box.height / 2, bottom: plan.at[at].y + box.height / 2 }));
      sides.forEach((a, j) => {
        const inside = a.left >= 0 && a.top >= 0 && a.right <= plan.width && a.bottom <= plan.height;
        check(inside, "a box is off the canvas");
        for (const b of sides.slice(0, j)) {
          const apart = a.left >= b.right || b.left >= a.right || a.top >= b.bottom || b.top >= a.bottom;
          check(apart, "boxes overlap");
        }
      });
      check(plan.edges.length === boxes.reduce((sum, box) => sum + box.inputs.length, 0), "an edge is missing");
      for (const { from, to, points } of plan.edges) {
        check(points[0][0] === plan.at[from].x && points.at(-1)[0] === plan.at[to].x, "an edge misses its box");
        const through = ([x, y]) => sides.some((s) => s.left < x && x < s.right && s.top < y && y < s.bottom);
        check(!points.slice(1, -1).some(through), "an edge goes through a box");
        check(points.every(([, y], k) => !k || y > points[k - 1][1]), "an edge goes up");
      }
    }
    """
    run("layout.js", check, tmp_path)
