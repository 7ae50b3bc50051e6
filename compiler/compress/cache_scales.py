"""Constant scales for quantized keys and values, from what they are on a calibration text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ...errors import LlmcError
from ...ir.caches import ChannelScales
from ...ir.program import Program
from ...kernels.ops import attention
from ...kernels.ops.quantized import SMALLEST_ABSMAX
from ...passes.queries import arguments, is_op
from ...runtimes.measure.texts import Text
from .calibration_text import calibration_tokens
from .stream import Stream

if TYPE_CHECKING:
    from ..config import CompileConfig
    from ..frontend.sources import ModelSource

# Sequences of the calibration text that keys and values are measured on.
_SEQUENCES = 4

# Other texts have larger keys and values than the calibration text. The largest code stands for this many times what
# the calibration text has.
HEADROOM = 1.5


def sample_tokens(source: ModelSource, text: Text, config: CompileConfig, max_seq_len: int) -> Tensor | None:
    """Return sequences of the calibration text, [sequences, length]; None if the model has no tokenizer to read it."""
    try:
        return calibration_tokens(source, text, min(_SEQUENCES, config.calib_samples), config.calib_length, max_seq_len)
    except LlmcError as error:
        if error.code.startswith("TOKENIZER"):
            return None
        raise


def cache_scales(
    program: Program, tokens: Tensor, watch: Callable[[int, int], None] = lambda done, total: None
) -> list[ChannelScales]:
    """Return the scales of int8 keys and values for each attention, in the program's order.

    Args:
        program: optimized or quantized, without caches.
        tokens: sequences of one length, [sequences, length].
        watch: called with the number of attentions that are done and the number of all.

    Raises:
        LlmcError: MODEL_NOT_FINITE.
    """
    attentions = [node for node in program.nodes if is_op(node, attention)]
    stream = Stream(program, tokens)
    found: dict[fx.Node, ChannelScales] = {}

    def scales_of(value: fx.Node) -> Tensor:
        largest = torch.stack([values[value].float().abs().amax((0, 2)) for values in stream.values]).amax(0)
        if not largest.isfinite().all():
            raise LlmcError(
                "MODEL_NOT_FINITE",
                f"On the calibration text, the values of {value.name} are NaN or infinite.",
                "Check the checkpoint's weights.",
            )
        # A channel that is zero on this text has the smallest scale of its head.
        positive = torch.where(largest > 0, largest, torch.inf).amin(1, keepdim=True)
        floor = torch.where(positive.isfinite(), positive, 1.0).clamp(min=SMALLEST_ABSMAX)
        return largest.maximum(floor) * (HEADROOM / 127)

    def before(node: fx.Node) -> None:
        if node in attentions:
            watch(len(found), len(attentions))
            call = arguments(node)
            found[node] = ChannelScales(scales_of(call["k"]), scales_of(call["v"]))

    if attentions:
        stream.run(before, until=attentions[-1])
        watch(len(found), len(attentions))
    return [found[node] for node in attentions]
