"""How an op of the `llmc` dialect is defined: one plain torch function is its meaning.

    @op
    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor: ...

The schema, the fake implementation that traces shapes, the CPU implementation and the oracle of every
test are that function. (Where tracing it for shapes would be slow, `@op(fake=...)` says the shapes in one step;
`opcheck` holds it to the meaning.) A faster kernel attaches to it as a provider and never changes what it means:

    @rms_norm.provider("triton", available=has_triton, when=lambda x, **_: x.is_cuda)
    def _(x, weight, eps): ...

Providers are asked in the order of `Op.priority`; the first that is available on this machine and takes
these arguments serves the call, and the meaning itself stands behind them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch

NAMESPACE = "llmc"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Provider:
    """A kernel for an op: where it can run at all, and which arguments it takes."""

    name: str
    fn: Callable[..., Any]
    available: Callable[[], bool]
    when: Callable[..., bool]


class Op:
    """One op of the dialect. Calling it calls the torch operator, so it can be traced."""

    def __init__(self, meaning: Callable[..., Any], fake: Callable[..., Any] | None = None) -> None:
        self.name = meaning.__name__
        self.meaning = meaning
        self.signature = inspect.signature(meaning)
        self.providers: dict[str, Provider] = {}
        self.priority: list[str] = []
        self.__doc__ = meaning.__doc__
        _LIBRARY.define(self.name + torch.library.infer_schema(meaning, mutates_args=()))
        _LIBRARY.impl(self.name, self._serve, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake or meaning, lib=_LIBRARY)
        self.overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{NAMESPACE}.{self.name}"

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, defaults filled in; works on values and on graph nodes alike."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def provider(
        self,
        name: str,
        *,
        when: Callable[..., bool] = lambda **_: True,
        available: Callable[[], bool] = lambda: True,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Attach a kernel under `name`, behind those attached before it.

        Args:
            when: called with the op's arguments by name; says whether the kernel takes them.
            available: says whether the kernel can run on this machine at all.
        """

        def attach(fn: Callable[..., Any]) -> Callable[..., Any]:
            self._reject_drift(name, fn)
            self.providers[name] = Provider(name, fn, available, when)
            self.priority.append(name)
            return fn

        return attach

    def serves(self, *args: Any, **kwargs: Any) -> str:
        """The name of the provider that would serve this call, or "meaning"."""
        provider = self._choose(self.bind(args, kwargs))
        return provider.name if provider else "meaning"

    def _reject_drift(self, name: str, fn: Callable[..., Any]) -> None:
        expected = [(p.name, p.default) for p in self.signature.parameters.values()]
        given = [(p.name, p.default) for p in inspect.signature(fn).parameters.values()]
        if given != expected:
            raise TypeError(f"provider {name!r} of {self} takes {given}, the op takes {expected}")
        if name in self.providers:
            raise ValueError(f"{self} already has a provider {name!r}")

    def _choose(self, arguments: dict[str, Any]) -> Provider | None:
        for name in self.priority:
            provider = self.providers[name]
            if provider.available() and provider.when(**arguments):
                return provider
        return None

    def _serve(self, *args: Any, **kwargs: Any) -> Any:
        if self.priority:
            arguments = self.bind(args, kwargs)
            if provider := self._choose(arguments):
                return provider.fn(**arguments)
        return self.meaning(*args, **kwargs)


@overload
def op(meaning: Callable[..., Any]) -> Op: ...
@overload
def op(*, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Op]: ...
def op(
    meaning: Callable[..., Any] | None = None, *, fake: Callable[..., Any] | None = None
) -> Op | Callable[[Callable[..., Any]], Op]:
    """Define an op of the dialect by its meaning; `fake` gives shapes and dtypes only, for the same arguments."""

    def define(meaning: Callable[..., Any]) -> Op:
        if meaning.__name__ in _OPS:
            raise ValueError(f"{NAMESPACE}.{meaning.__name__} is defined twice")
        _OPS[meaning.__name__] = defined = Op(meaning, fake)
        return defined

    return define if meaning is None else define(meaning)


def all_ops() -> dict[str, Op]:
    """Every op of the dialect by name."""
    return dict(_OPS)


def op_of(target: object) -> Op | None:
    """The op of the dialect that a graph node calls, if it calls one."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return _OPS.get(target._schema.name.removeprefix(NAMESPACE + "::"))
    return None
