"""Define ops of the `llmc` dialect; a plain torch function is the meaning.

    @op
    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor: ...

This function is the schema, the implementation on all devices, the fake implementation that infers shapes,
and the reference in every test. If inferring shapes with it would be slow, `@op(fake=...)` computes them directly;
`opcheck` compares both. A faster kernel is attached as a provider, which never changes the meaning:

    @rms_norm.provider("triton", available=has_triton, when=lambda x, **_: x.is_cuda)
    def _(x, weight, eps): ...

Providers are tried in the order of `Op.priority`. The first that is available on this machine and supports the
arguments runs the call. If there is none, the meaning runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch

NAMESPACE = "llmc"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
"""The library that `op` adds torch operators to."""
OPS: dict[str, Op] = {}
"""The ops that were defined, by name. Other modules use `all_ops` and `op_of`."""


@dataclass(frozen=True)
class Provider:
    """A kernel for an op, and predicates for machines and arguments it supports."""

    name: str
    fn: Callable[..., Any]
    available: Callable[[], bool]
    when: Callable[..., bool]


class Op:
    """An op of the dialect. Calling it calls the torch operator, so it can be traced."""

    def __init__(self, meaning: Callable[..., Any], fake: Callable[..., Any] | None = None) -> None:
        self.name = meaning.__name__
        self.meaning = meaning
        self.signature = inspect.signature(meaning)
        self.providers: dict[str, Provider] = {}
        self.priority: list[str] = []
        self.__doc__ = meaning.__doc__
        LIBRARY.define(self.name + torch.library.infer_schema(meaning, mutates_args=()))
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake or meaning, lib=LIBRARY)
        self.overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{NAMESPACE}.{self.name}"

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments (values or graph nodes) by name, defaults included."""
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
        """Attach a kernel under `name`, with the lowest priority so far.

        Args:
            when: called with the op's arguments by name; returns True if the kernel supports them.
            available: returns True if the kernel can run on this machine.
        """

        def attach(fn: Callable[..., Any]) -> Callable[..., Any]:
            self._check_provider(name, fn)
            self.providers[name] = Provider(name, fn, available, when)
            self.priority.append(name)
            return fn

        return attach

    def serves(self, *args: Any, **kwargs: Any) -> str:
        """Return the name of the provider that would run this call, or "meaning"."""
        provider = self._choose(self.bind(args, kwargs))
        return provider.name if provider else "meaning"

    def _check_provider(self, name: str, fn: Callable[..., Any]) -> None:
        expected = [(p.name, p.default) for p in self.signature.parameters.values()]
        actual = [(p.name, p.default) for p in inspect.signature(fn).parameters.values()]
        if actual != expected:
            raise TypeError(f"provider {name!r} of {self} has the parameters {actual}, the op has {expected}")
        if name in self.providers:
            raise ValueError(f"{self} already has a provider {name!r}")

    def _choose(self, arguments: dict[str, Any]) -> Provider | None:
        for name in self.priority:
            provider = self.providers[name]
            if provider.available() and provider.when(**arguments):
                return provider
        return None

    def _run(self, *args: Any, **kwargs: Any) -> Any:
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
    """Define an op of the dialect by its meaning.

    Args:
        fake: returns empty tensors of the right shapes and dtypes, for the same arguments; None: run the meaning.
    """

    def define(meaning: Callable[..., Any]) -> Op:
        if meaning.__name__ in OPS:
            raise ValueError(f"{NAMESPACE}.{meaning.__name__} is defined twice")
        OPS[meaning.__name__] = defined = Op(meaning, fake)
        return defined

    return define if meaning is None else define(meaning)


def all_ops() -> dict[str, Op]:
    """Return every op of the dialect by name."""
    return dict(OPS)


def op_of(target: object) -> Op | None:
    """Return the op of the dialect that a node's target refers to, or None."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return OPS.get(target._schema.name.removeprefix(NAMESPACE + "::"))
    return None
