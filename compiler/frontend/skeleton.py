"""Build a model's structure without allocating its parameters."""

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
    """Create parameters on the meta device, without storage, inside this context.

    Buffers are real, because modules compute their values when they are built.
    """
    replacements = WeakIdKeyDictionary()  # original parameter -> meta parameter, so that tied parameters stay tied

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if parameter not in replacements:
                replacements[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            parameter = replacements[parameter]
        _register_parameter(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", register):
        yield


@contextmanager
def fake_parameters(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Replace every parameter by a fake CPU tensor of `mode` inside this context.

    Tied parameters stay tied.

    On exit, all attributes, parameters, buffers and submodules are restored, because a forward call may have stored
    fake tensors in the module.
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
    """The module's dicts of parameters, buffers and submodules.

    Each comes with a copy of its present entries.
    """
    return [(table, dict(table)) for table in (owner._parameters, owner._buffers, owner._modules)]
