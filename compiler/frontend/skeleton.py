"""A model's structure without its parameters' bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.weak import WeakIdKeyDictionary

_register_parameter = nn.Module.register_parameter


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made within get parameters without storage; buffers are real, for their values are computed."""
    made = WeakIdKeyDictionary()  # so that a parameter that has two places stays one

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if parameter not in made:
                made[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            parameter = made[parameter]
        _register_parameter(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", register):
        yield


@contextmanager
def fake_parameters(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Within, every parameter is a fake CPU tensor of `mode`, tied ones still one; then all is as it was.

    All of the module's state comes back, for a forward may keep what it computed, and would keep fake tensors.
    """
    fakes: dict[int, nn.Parameter] = {}
    state = [(owner, dict(vars(owner)), _registered(owner)) for owner in module.modules()]
    for owner, _, _ in state:
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fakes:
                with mode:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                fakes[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            owner._parameters[name] = fakes[id(parameter)]
    try:
        yield
    finally:
        for owner, attributes, registered in state:
            vars(owner).clear()
            vars(owner).update(attributes)
            for table, entries in registered:
                table.clear()
                table.update(entries)


def _registered(owner: nn.Module) -> list[tuple[dict, dict]]:
    """The module's own tables of parameters, buffers and submodules, each with its entries now."""
    return [(table, dict(table)) for table in (owner._parameters, owner._buffers, owner._modules)]
