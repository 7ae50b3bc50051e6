"""Per-layer errors equal plain arithmetic on known layer outputs."""

from __future__ import annotations

import numpy as np
import pytest

from llmc import LlmcError
from llmc.runtimes.measure.layers import LayerReference, measure_layers
from llmc.runtimes.measure.windows import Window

RANDOM = np.random.default_rng(0)
WINDOWS = [Window(np.arange(9), 1), Window(np.arange(7), 4)]
NAMES = ("m.2", "m.10")


class FixedOutputs:
    """An engine with fixed layer outputs for each window."""

    def __init__(self, outputs: list[dict[str, np.ndarray]], unclear: dict[str, str] | None = None) -> None:
        self.outputs, self.unclear, self.before = outputs, unclear or {}, {"m.10": "m.2"}

    def values(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        assert tokens.dtype == np.int64 and tokens.ndim == 1
        return next(o for w, o in zip(WINDOWS, self.outputs, strict=True) if np.array_equal(w.tokens[:-1], tokens))


def random_outputs() -> list[dict[str, np.ndarray]]:
    return [{n: RANDOM.normal(size=(1, len(w.tokens) - 1, 5)).astype(np.float32) for n in NAMES} for w in WINDOWS]


def reference(values: list[dict[str, np.ndarray]]) -> LayerReference:
    return LayerReference([{name: [value] for name, value in window.items()} for window in values])


def test_each_number_follows_its_definition() -> None:
    own, right = random_outputs(), random_outputs()
    found = measure_layers(FixedOutputs(own), reference(right), WINDOWS)
    assert (found.tokens, found.windows, [layer.name for layer in found.layers]) == (11, 2, ["m.2", "m.10"])

    def scored(values: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
        return np.concatenate([v[name][0, w.first - 1 :] for v, w in zip(values, WINDOWS, strict=True)])

    differences = [scored(own, name) - scored(right, name) for name in NAMES]
    for layer, difference in zip(found.layers, differences, strict=True):
        expected = scored(right, layer.name)
        assert layer.error == pytest.approx(np.sqrt((difference**2).mean() / (expected**2).mean()), rel=1e-6)
        shares = np.linalg.norm(difference, axis=1) / np.linalg.norm(expected, axis=1)
        assert layer.median == pytest.approx(np.median(shares), rel=1e-6)
    added = np.linalg.norm(differences[1] - differences[0], axis=1) / np.linalg.norm(scored(right, "m.10"), axis=1)
    assert [layer.added for layer in found.layers] == [None, pytest.approx(np.median(added), rel=1e-6)]


def test_a_huge_token_dominates_the_error_but_not_the_median() -> None:
    right = random_outputs()
    own = [{name: value * np.float32(1.1) for name, value in window.items()} for window in right]
    own[0]["m.2"][0, 0] = right[0]["m.2"][0, 0] = 1e5
    layer = measure_layers(FixedOutputs(own), reference(right), WINDOWS).layers[0]
    assert layer.error is not None and layer.error < 1e-3
    assert layer.median == pytest.approx(0.1, rel=1e-4)


def test_the_reference_output_of_the_same_shape_is_compared() -> None:
    right = random_outputs()
    more = [{n: [v, v[..., :2]] for n, v in window.items()} for window in right]
    assert [layer.error for layer in measure_layers(FixedOutputs(right), LayerReference(more), WINDOWS).layers] == [
        0,
        0,
    ]


def test_layers_that_cannot_be_compared_have_a_reason() -> None:
    right = random_outputs()
    cases = {
        "the reference's layer has 2 outputs of shape [1, 6, 5], not one": [right[1]["m.10"]] * 2,
        "the reference's layer has no outputs of shape [1, 6, 5], not one": [right[1]["m.10"][..., :4]],
    }
    for why, values in cases.items():
        given = LayerReference([reference(right).windows[0], {"m.2": [right[1]["m.2"]], "m.10": values}])
        first, second = measure_layers(FixedOutputs(right), given, WINDOWS).layers
        assert (first.error, second.error, second.why) == (0, None, why)
    absent = LayerReference([{"m.2": [w["m.2"]]} for w in right])
    assert measure_layers(FixedOutputs(right), absent, WINDOWS).layers[1].why == "the reference has no such layer"
    one = [{"m.10": w["m.10"]} for w in right]
    first, second = measure_layers(FixedOutputs(one, {"m.2": "it has 3 outputs"}), reference(right), WINDOWS).layers
    assert (first.why, second.error, second.added) == ("it has 3 outputs", 0, None)
    zero = reference([{name: value * 0 for name, value in window.items()} for window in right])
    with pytest.raises(LlmcError, match=r"LAYERS_UNLIKE.*m\.2.*is zero or not a number"):
        measure_layers(FixedOutputs(right), zero, WINDOWS)
    with pytest.raises(LlmcError, match=r"LAYERS_UNLIKE.*m\.2: the reference has no such layer"):
        measure_layers(FixedOutputs(right), LayerReference([{}, {}]), WINDOWS)
    with pytest.raises(LlmcError, match=r"LAYERS_UNLIKE.*no layer has an output for each token"):
        measure_layers(FixedOutputs([{}, {}]), reference(right), WINDOWS)


def test_progress_is_reported_and_the_document_is_plain() -> None:
    right, progress = random_outputs(), []
    found = measure_layers(FixedOutputs(right), reference(right), WINDOWS, lambda *step: progress.append(step))
    assert progress == [("layers", 0, 2), ("layers", 1, 2), ("layers", 2, 2)]
    document = found.as_dict()
    assert (document["tokens"], document["windows"]) == (11, 2)
    assert document["layers"][0] == {"name": "m.2", "error": 0, "median": 0, "added": None, "why": None}
