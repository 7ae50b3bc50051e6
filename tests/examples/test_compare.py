"""The comparison in examples/compare without its engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import llmc

COMPARE = Path(llmc.__file__).resolve().parent / "examples" / "compare"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(COMPARE))


class Counting:
    """An engine whose next token is the last one plus one.

    It takes 1 s per prompt token and 4 s per new token.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.empty = False
        self.prompts: list[list[int]] = []

    def reset(self) -> None:
        self.now += 1000  # the time to empty the cache is not measured
        self.empty = True

    def generate(self, prompt: list[int], count: int, on_token: Callable[[int], None]) -> None:
        assert self.empty
        self.empty = False
        self.prompts.append(prompt)
        self.now += len(prompt)
        for token in range(prompt[-1] + 1, prompt[-1] + 1 + count):
            on_token(token)
            self.now += 4.0


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    import protocol

    engine = Counting()
    monkeypatch.setattr(protocol, "time", SimpleNamespace(perf_counter=lambda: engine.now))
    return engine


def test_prefill_and_decode_are_measured_separately(counting):
    from protocol import measure

    pp, tg = measure(counting, vocab=100, prompt=32, tokens=8, repeats=3)
    assert pp == [1.0] * 3
    assert tg == [0.25] * 3


def test_repeats_have_different_tokens_that_are_the_same_for_all_engines(counting):
    from protocol import measure

    measure(counting, vocab=100, prompt=32, tokens=8, repeats=3)
    measured = counting.prompts
    assert [len(prompt) for prompt in measured] == [32, 1] * 4  # one round of warm-up
    assert len({tuple(prompt) for prompt in measured if len(prompt) > 1}) == 4
    counting.prompts = []
    measure(counting, vocab=100, prompt=32, tokens=8, repeats=3)
    assert counting.prompts == measured


def test_decoding_is_measured_after_prompts_of_a_length(counting):
    from protocol import TOKENS_AT, decode_after

    assert decode_after(counting, 100, 50, 2) == [0.25] * 2
    assert [len(prompt) for prompt in counting.prompts] == [50] * 3 and len(set(map(tuple, counting.prompts))) == 3
    assert counting.now == 3 * (1000 + 50 + 4 * (TOKENS_AT + 1))


def test_the_checks_continue_the_expected_text(counting):
    from protocol import checks

    greedy, following = checks(counting, [1, 2], [3, 9, 5])
    assert greedy == [3, 4, 5]
    assert following == [3, 4, 10]  # after 2, after 3, after 9


def test_an_engine_that_stops_early_is_refused(counting):
    from protocol import timed

    counting.generate = lambda prompt, count, on_token: on_token(0)
    with pytest.raises(RuntimeError, match="1 tokens instead of 5"):
        timed(counting, [1], 5)


def test_interleaved_heads_rotate_like_transformers():
    """Scores don't depend on the pairs that are rotated.

    They are equal with pairs (i, i + half), and after interleaving with pairs (2i, 2i + 1).
    """
    from write_gguf import interleave_heads

    heads, dim, hidden = 3, 8, 16
    torch.manual_seed(0)
    q, k = torch.randn(2, heads * dim, hidden)
    x, y = torch.randn(2, hidden)
    turn = torch.polar(torch.ones(dim // 2), 5 * 100.0 ** (-torch.arange(dim // 2) / (dim // 2)))

    def halves(value: torch.Tensor) -> torch.Tensor:
        return torch.complex(*value.view(heads, 2, dim // 2).unbind(1))

    def neighbours(value: torch.Tensor) -> torch.Tensor:
        return torch.complex(*value.view(heads, dim // 2, 2).unbind(2))

    def scores(pairs: Callable[[torch.Tensor], torch.Tensor], q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (pairs(q @ x) * turn * pairs(k @ y).conj()).real.sum(1)

    expected = scores(halves, q, k)
    torch.testing.assert_close(scores(neighbours, interleave_heads(q, heads), interleave_heads(k, heads)), expected)
    assert not torch.allclose(scores(neighbours, q, k), expected)


@pytest.mark.parametrize(("hidden", "intermediate", "size"), [(2048, 5632, "128"), (576, 1536, "64"), (2048, 96, "32")])
def test_groups_divide_every_linear(tmp_path, hidden, intermediate, size):
    from prepare import group_size

    (tmp_path / "config.json").write_text(f'{{"hidden_size": {hidden}, "intermediate_size": {intermediate}}}')
    assert group_size(tmp_path) == size


def test_a_failed_recipe_leaves_no_model(tmp_path):
    from prepare import make_folder

    def fail(out: Path) -> None:
        out.mkdir()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        make_folder(tmp_path / "model", fail)
    assert not (tmp_path / "model").exists()
    assert make_folder(tmp_path / "model", Path.mkdir).is_dir()  # the remains of a failed attempt are no obstacle


def test_a_model_is_made_again_when_its_recipe_changes(tmp_path):
    from prepare import make_folder

    calls = []

    def make(out: Path) -> None:
        out.mkdir()
        calls.append(out)

    for key in ("a", "a", "b", "b"):
        assert make_folder(tmp_path / "model", make, key) == tmp_path / "model"
    assert len(calls) == 2


def test_every_variant_has_a_recipe_a_peer_and_exact_pins():
    from environments import pins, requirements
    from prepare import RECIPES, VARIANTS

    for engine in {variant.engine for variant in VARIANTS}:
        assert engine in RECIPES
        assert (COMPARE / f"peer_{engine}.py").exists()
        assert engine == "llmc" or [pin for path in requirements(engine) for pin in pins(path)]


def test_a_requirement_that_is_not_an_exact_pin_is_refused(tmp_path):
    from environments import pins

    (tmp_path / "x.txt").write_text("# comment\ntorch==2.13.0\nnumpy>=2\n")
    with pytest.raises(SystemExit, match="numpy>=2"):
        pins(tmp_path / "x.txt")


@pytest.mark.parametrize("engine", ["llama", "genai"])
def test_a_compiled_peer_is_compiled_anew_with_its_flags(tmp_path, monkeypatch, engine):
    import environments

    mismatches = iter(["none", ""])
    runs = []
    monkeypatch.setattr(environments, "mismatch", lambda python, files: next(mismatches))
    monkeypatch.setattr(environments.subprocess, "run", lambda command, **options: runs.append((command, options)))
    environments.python_of(engine, tmp_path)
    installs = [(command, options["env"].get("CXXFLAGS", "")) for command, options in runs if "install" in command]
    assert len(installs) == len(environments.requirements(engine))
    for command, flags in installs:
        assert ("--no-cache-dir" in command) == (engine == "llama")
        assert ("amx_config.h" in flags) == (engine == "llama")
        assert engine != "llama" or Path(flags.removeprefix("-include ")).exists()


def _round(engine: str, pp: list[float], tg: list[float], following: tuple[int, ...] = (7, 8, 9)) -> dict:
    return {
        "engine": engine, "version": "1", "bytes": 5_000_000, "pp": pp, "tg": tg,
        "load_s": 1.0, "peak_rss": 7_000_000, "following": following,
    }  # fmt: skip


def test_ratios_are_relative_to_the_best_peer_with_the_same_bits():
    from report import Row, table

    rows = [
        Row(
            4, "int4", [_round("llmc", [900, 100, 110], [30]), _round("llmc", [120], [30]), _round("llmc", [130], [30])]
        ),
        Row(4, "Q4_0", [_round("llama.cpp", [100], [60])]),
        Row(4, "int4", [_round("genai", [60], [20]), _round("genai", [60], [20], following=(7, 0, 9))]),
        Row(8, "int8", [_round("genai", [9999], [9999])]),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows, [7, 8, 9], 512, 128).splitlines()]
    assert lines[2] == ["llmc", "1", "int4", "5", "120 (110 to 130)", "30 (30 to 30)", "1.20", "0.50", "1.0", "7", "3"]
    assert lines[3][6:8] == ["1.00", "1.00"]
    assert lines[4][6:] == ["0.60", "0.33", "1.0", "7", "2"]
    assert lines[5][6:8] == ["1.00", "1.00"]
    assert len({len(line) for line in lines}) == 1


def test_speeds_by_the_length_of_the_context():
    from report import Row, context_table

    def row(engine: str, bits: int, *rounds: tuple[float, float]) -> Row:
        return Row(
            bits, "x", [_round(engine, [1], [1]) | {"at": {"128": [a, 9 * a, a], "1900": [b]}} for a, b in rounds]
        )

    rows = [row("genai", 8, (7, 7)), row("llmc", 4, (40, 20), (60, 22), (50, 24)), row("llama.cpp", 4, (100, 11))]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in context_table(rows).splitlines()]
    assert lines[0] == ["engine", "format", "MB", "128", "1900"]
    assert lines[2] == ["llmc", "x", "5", "50 (40 to 60), 0.50", "22 (20 to 24), 2.00"]
    assert lines[3][3:] == ["100 (100 to 100), 1.00", "11 (11 to 11), 1.00"]
    assert lines[4][0] == "genai"


def test_the_section_is_replaced_and_nothing_else(tmp_path):
    from report import markers, replace_section

    page = tmp_path / "page.md"
    (begin, end), (other_begin, other_end) = markers("compare"), markers("compare-batches")
    other = f"{other_begin}\nother\n{other_end}"
    page.write_text(f"above\n{other}\n{begin}\nold\n{end}\nbelow\n")
    replace_section(page, "new\n")
    replace_section(page, "newer\n")
    assert page.read_text() == f"above\n{other}\n{begin}\nnewer\n{end}\nbelow\n"
    replace_section(page, "the other\n", "compare-batches")
    assert page.read_text() == f"above\n{other_begin}\nthe other\n{other_end}\n{begin}\nnewer\n{end}\nbelow\n"


@pytest.mark.parametrize("text", ["none", "<!-- compare: begin -->", "<!-- compare: end --> <!-- compare: begin -->"])
def test_a_page_without_markers_is_unchanged(tmp_path, text):
    from report import replace_section

    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SystemExit, match="no markers"):
        replace_section(page, "new")
    assert page.read_text() == text


def test_a_busy_machine_delays_and_then_stops_a_run(monkeypatch):
    import machine

    shares = iter([0.9, 0.5, 0.01])
    monkeypatch.setattr(machine, "busy_share", lambda seconds: next(shares))
    machine.wait_until_quiet()
    assert next(shares, None) is None
    monkeypatch.setattr(machine, "busy_share", lambda seconds: 0.9)
    with pytest.raises(SystemExit, match="90% busy"):
        machine.wait_until_quiet(patience_s=-1)


def test_the_busy_share_counts_time_that_is_not_idle(monkeypatch):
    import machine

    samples = iter([(100, 1000), (175, 1100)])
    monkeypatch.setattr(machine, "cpu_ticks", lambda: next(samples))
    assert machine.busy_share(0) == pytest.approx(0.25)


@pytest.mark.parametrize(("bits", "agreeing", "accepted"), [(8, 8, True), (8, 7, False), (4, 1, True), (4, 0, False)])
def test_an_engine_with_other_weights_is_refused(bits, agreeing, accepted):
    from report import Row, refuse_other_weights

    row = Row(bits, "x", [_round("genai", [1], [1], following=(1,) * agreeing + (0,) * (16 - agreeing))])
    if accepted:
        refuse_other_weights(row, [1] * 16)
    else:
        with pytest.raises(SystemExit, match=f"{agreeing} of 16"):
            refuse_other_weights(row, [1] * 16)
