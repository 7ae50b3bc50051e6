"""An execution context of a plan, and the shapes and addresses that it was told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..device_caches import DeviceCaches
from .open_plan import OpenPlan


@dataclass(frozen=True)
class CallShape:
    """What a context must be told about a call.

    Attributes:
        slot: the first slot.
        batch: the number of sequences, in adjacent slots.
        tokens: new tokens of each.
        rows: returned logits of each.
    """

    slot: int
    batch: int
    tokens: int
    rows: int


class BoundContext:
    """A context of one profile.

    Args:
        index: the profile.
    """

    def __init__(self, plan: OpenPlan, index: int, caches: DeviceCaches) -> None:
        self._plan, self._caches = plan, caches
        self._context: Any = plan.create_context(index)
        self._bound: CallShape | None = None

    def forget(self) -> None:
        """Tell the context all addresses anew when it is used next."""
        self._bound = None

    def close(self) -> None:
        """Let go of the library's context, which must not outlive its plan."""
        self._context = None

    def bind(self, shape: CallShape, addresses: Mapping[str, int]) -> None:
        """Tell the context the shapes and addresses of a call, as far as they have changed.

        Args:
            addresses: of the inputs and outputs other than caches; they stay until `forget`.
        """
        bound, self._bound = self._bound, None  # if it fails halfway, nothing is known
        if bound != shape:
            self._bind_inputs(shape)
        if bound is None:
            for name, address in addresses.items():
                self._set_address(name, address)
        for index, tensor in enumerate(self._caches.tensors):
            if bound is None or bound.batch != shape.batch:
                self._set_shape(tensor.past, (shape.batch, *tensor.shape))
            if bound is None or bound.slot != shape.slot:
                address = self._caches.address(index, shape.slot)
                self._set_address(tensor.past, address)
                self._set_address(tensor.present, address)
        self._bound = shape

    def enqueue(self, stream: int) -> None:
        """Put the computation of the call on a stream."""
        if not self._context.execute_async_v3(stream):
            raise self._plan.failed("run a plan")

    def _bind_inputs(self, shape: CallShape) -> None:
        self._set_shape("input_ids", (shape.batch, shape.tokens))
        self._set_shape("starts", (shape.batch,))
        self._set_shape("rows", (shape.rows,))

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise self._plan.failed(f"take {name} of shape {list(shape)}")

    def _set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise self._plan.failed(f"take the memory of {name}")
