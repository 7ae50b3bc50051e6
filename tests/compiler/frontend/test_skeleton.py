"""Modules without parameter storage.

Parameters are meta or fake, buffers are real, and ties are kept.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from llmc.compiler.frontend.skeleton import fake_parameters, parameters_on_meta


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        shared = nn.Parameter(torch.ones(4))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first.bias = self.second.bias = shared
        self.register_parameter("none", None)
        self.register_buffer("table", torch.arange(4.0).cos())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embed(tokens) * self.table)))


def check_ties(model: Tied) -> None:
    assert model.head.weight is model.embed.weight
    assert model.first.bias is model.second.bias
    assert model.first.weight is not model.second.weight
    assert model.none is None


def test_parameters_built_inside_the_context_are_on_meta() -> None:
    with parameters_on_meta():
        model = Tied()
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    assert torch.equal(model.table, torch.arange(4.0).cos())
    check_ties(model)


def test_modules_built_after_the_context_are_normal() -> None:
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        raise ZeroDivisionError
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("on_meta", [False, True])
def test_fake_parameters_are_undone_on_exit(on_meta: bool) -> None:
    if on_meta:
        with parameters_on_meta():
            model = Tied()
    else:
        model = Tied()
    before = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(ZeroDivisionError), fake_parameters(model, FakeTensorMode()):
        check_ties(model)
        assert all(isinstance(p.data, FakeTensor) and p.device.type == "cpu" for p in model.parameters())
        assert not isinstance(model.table, FakeTensor)
        raise ZeroDivisionError
    after = dict(model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
