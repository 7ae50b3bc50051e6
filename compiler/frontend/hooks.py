"""Hooks into transformers that capture attention, masks and experts.

Attention and a mixture of experts become one op each. transformers looks up attention functions in a registry by name.
`capturing` registers the functions below under the name `llmc`, so every model that uses the registry is captured the
same way, whatever its family. No mask tensor enters the graph. The *function* that defines the mask is evaluated during
capture, and the rule that it follows becomes arguments of the attention op.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from ...errors import LlmcError
from ...kernels.ops import attention as attention_op
from ...kernels.ops import gated_act, moe
from ...kernels.ops.attention_mask import MaskRule, likely_rule

NAME = "llmc"


class Attention(Enum):
    """The attention implementation of a transformers model during capture."""

    HOOKED = NAME  # one attention op per layer; the mask is a rule
    EAGER = "eager"  # the model's own code with a mask tensor, for models that don't use the registry


def is_hookable(model: nn.Module) -> bool:
    """True if `capturing` has an effect: the model is a transformers model."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


@contextmanager
def capturing(model: nn.Module, max_seq_len: int, attention: Attention = Attention.HOOKED) -> Iterator[None]:
    """Make a transformers model call the dialect's ops.

    Experts become `moe` ops and, if hooked, attention becomes an attention op.

    On exit, transformers and the model's configs are as they were. Any other module is left alone.
    """
    if not is_hookable(model):
        yield
        return
    from transformers import masking_utils, modeling_rope_utils
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Each batch entry is one sequence without padding. Code that looks for packed sequences or padding in the data
    # would only add data-dependent ops to the graph.
    chunked_overlay = masking_utils.chunked_overlay
    patches = {
        "find_packed_sequence_indices": lambda *_, **__: None,
        "chunked_overlay": lambda size, _padding: chunked_overlay(size, cast(Tensor, _NoPadding())),
    }
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    with ExitStack() as stack:
        for registry, function in (
            (ALL_ATTENTION_FUNCTIONS, _attention),
            (masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, functools.partial(_mask, max_seq_len)),
            (ALL_EXPERTS_FUNCTIONS, _experts),
        ):
            stack.enter_context(mock.patch.dict(registry._global_mapping, {NAME: function}))
        for name, replacement in patches.items():
            stack.enter_context(mock.patch.object(masking_utils, name, replacement))
        stack.enter_context(mock.patch.object(modeling_rope_utils, "torch", _TorchOfFixedLength(max_seq_len)))
        for config in configs.values():
            for attribute, name in (
                ("_attn_implementation_internal", attention.value),
                ("_experts_implementation_internal", NAME),
            ):
                if hasattr(config, attribute):
                    stack.enter_context(mock.patch.object(config, attribute, name))
        yield


class _TorchOfFixedLength:
    """A `torch` module for rope code that uses the maximum length.

    Its `max` of positions is always `max_seq_len - 1`.

    Some rope scalings choose their frequencies by the largest position in the data. A program must choose once, so
    it uses the frequencies of a sequence of `max_seq_len` tokens.
    """

    def __init__(self, max_seq_len: int) -> None:
        self.last_position = max_seq_len - 1

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def max(self, positions: Tensor) -> Tensor:
        return torch.tensor(self.last_position)


class _NoPadding:
    """Number of padding tokens of each batch entry: always 0."""

    def __getitem__(self, _entry: Any) -> int:
        return 0


def _mask(max_seq_len: int, *_: Any, mask_function: Callable[..., Tensor], **__: Any) -> MaskRule | LlmcError:
    """Return the mask's rule, or the error to raise if a layer uses the mask.

    A model may create a mask that none of its layers uses, so a mask without a rule is not an error yet.
    """
    with disable_proxy_modes_tracing(), unset_fake_temporarily():
        try:
            return mask_rule(mask_function, max_seq_len)
        except LlmcError as error:
            return error


def mask_rule(mask_function: Callable[..., Tensor], max_seq_len: int) -> MaskRule:
    """Find the rule of a transformers mask function.

    The rule holds for all positions below `max_seq_len`.

    Raises:
        LlmcError: ``MASK_UNKNOWN`` if it follows none.
    """
    zero = torch.zeros((), dtype=torch.long)
    keys = torch.arange(max_seq_len)

    def visible_keys(query: int) -> Tensor:
        return mask_function(zero, zero, torch.tensor(query), keys).expand(max_seq_len)

    rule = likely_rule(visible_keys, max_seq_len)
    last = max_seq_len - 1
    edge = rule.window or rule.chunk or last
    for query in {0, 1, 2, edge - 1, edge, edge + 1, 2 * edge - 1, 2 * edge, last // 3, last - 1, last}:
        if 0 <= query <= last and not torch.equal(visible_keys(query), rule.sees(torch.tensor([query]), keys)[0]):
            raise LlmcError(
                "MASK_UNKNOWN",
                f"The model's attention mask is not full, causal, windowed or chunked (checked at query {query}).",
                "llmc can compile only models with one of these masks.",
            )
    return rule


# Arguments that models pass to every attention function and that don't change the captured result.
_IGNORED = frozenset(
    {"dropout", "sliding_window", "is_causal", "position_ids", "use_cache", "cache_position", "past_key_values"}
    | {"output_attentions", "output_hidden_states", "return_dict", "training", "layer_idx", "target_dtype"}
)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskRule | LlmcError | None,
    *_: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if isinstance(attention_mask, LlmcError):
        raise attention_mask
    unknown = [k for k, v in others.items() if k not in _IGNORED and isinstance(v, (Tensor, float))]
    if unknown or isinstance(attention_mask, Tensor):
        raise LlmcError(
            "ATTENTION_UNKNOWN",
            f"{type(module).__name__} passes {unknown or ['a mask tensor']} to attention, which llmc doesn't support.",
            "llmc can't capture this model through the attention registry of transformers.",
        )
    # Without a mask, transformers' own functions follow the argument or the module's attribute.
    causal = others.get("is_causal")
    rule = attention_mask or MaskRule(causal=getattr(module, "is_causal", True) if causal is None else causal)
    out = attention_op(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=rule.causal,
        window=rule.window,
        chunk=rule.chunk,
        softcap=softcap,
        sinks=s_aux if s_aux is not None else sinks,
        bias=position_bias,
    )
    # Contiguous like transformers' own functions: models apply views that need it.
    return out.transpose(1, 2).contiguous(), None


def _experts(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    w_in = experts.gate_up_proj if experts.has_gate else experts.up_proj
    w_out, b_in, b_out = experts.down_proj, None, None
    if experts.has_bias:
        b_in = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        b_out = experts.down_proj_bias
    if experts.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    if getattr(experts, "has_post_expert_norm", False):  # transformers 5.17 has no such experts
        raise LlmcError(
            "EXPERTS_UNKNOWN",
            f"{type(experts).__name__} normalizes the output of each expert, which the `moe` op doesn't support.",
            "Models with such experts can't be compiled yet.",
        )
    with disable_proxy_modes_tracing(), unset_fake_temporarily():
        activation = _activation(experts)
    if activation.pop("interleaved"):
        w_in = torch.cat([w_in[:, ::2], w_in[:, 1::2]], dim=1)
        b_in = None if b_in is None else torch.cat([b_in[:, ::2], b_in[:, 1::2]], dim=1)
    return moe(hidden, ids, weights, w_in, w_out, b_in, b_out, gated=experts.has_gate, **activation)


def _activation(experts: Any) -> dict[str, Any]:
    """Find the arguments of `moe` that describe an expert's activation.

    The activation is applied between the expert's two projections.

    The module's own function is compared on a grid of inputs with every activation of the dialect. The module's
    float attributes are tried as alpha and limit. The first combination that agrees on the whole grid is returned,
    with `interleaved`: True if gate and up channels alternate.
    """
    points = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-300.0, 300.0])])
    gate, up = (x.reshape(-1, 1) for x in torch.meshgrid(points, points, indexing="ij"))
    numbers = sorted({float(v) for v in vars(experts).values() if isinstance(v, float)})
    acts = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid")
    for interleaved, act in itertools.product((False, True), acts):
        alphas = [1.0, 1.702, *numbers] if act == "silu" else [1.0]
        if not experts.has_gate:
            if not interleaved and torch.allclose(experts.act_fn(gate), gated_act(gate, torch.ones_like(gate), act)):
                return {"act": act, "interleaved": False}
            continue
        # Two channels each, so that [gate, gate, up, up] and [gate, up, gate, up] differ.
        channels = [gate, up, gate, up] if interleaved else [gate, gate, up, up]
        wanted = experts._apply_gate(torch.cat(channels, dim=-1))
        for alpha, limit, offset in itertools.product(alphas, [None, *numbers], (0.0, 1.0)):
            ours = gated_act(gate, up, act, alpha, limit, offset).expand(-1, 2)
            if wanted.shape == ours.shape and torch.allclose(wanted, ours, rtol=1e-5, atol=1e-5):
                return {"act": act, "alpha": alpha, "limit": limit, "offset": offset, "interleaved": interleaved}
    raise LlmcError(
        "EXPERTS_UNKNOWN",
        f"{type(experts).__name__} applies an activation between its projections that the `moe` op doesn't support.",
        "Add the activation to the `gated_act` op; the capture hook then recognizes it.",
    )
