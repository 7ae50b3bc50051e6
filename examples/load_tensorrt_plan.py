"""Run a plan of an artifact with TensorRT's own Python interface, without llmc: greedy tokens after token ids.

    python examples/load_tensorrt_plan.py DIR 504 3575 260

It needs TensorRT, and torch for memory on the GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import torch

DEVICE = "cuda"


def generate(folder: Path, tokens: list[int], count: int) -> list[int]:
    """Return the next tokens, each the most probable one."""
    section = json.loads((folder / "manifest.json").read_text())["section"]
    plan = section["plans"][0]
    trt = importlib.import_module(plan["library"])
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine((folder / plan["file"]).read_bytes())
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    dtypes = {trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16}
    caches = {}
    for name in names:
        if name.startswith("past_key_values."):  # [B, heads, length, width] in zeros; a present is in the same memory
            shape = (1, *tuple(engine.get_tensor_shape(name))[1:])
            caches[name] = torch.zeros(shape, dtype=dtypes[engine.get_tensor_dtype(name)], device=DEVICE)
    logits = torch.empty(1, 1, tuple(engine.get_tensor_shape("logits"))[-1], device=DEVICE)
    stream, held, made = torch.cuda.Stream(), 0, []
    contexts = []
    for profile in range(2):  # 0 is for prompts, 1 for single tokens
        contexts.append(engine.create_execution_context())
        contexts[-1].set_optimization_profile_async(profile, stream.cuda_stream)
    stream.synchronize()
    longest, new = section["profiles"]["prefill"]["tokens"], list(tokens)
    while len(made) < count:
        piece, new = new[:longest], new[longest:]
        inputs = {"input_ids": [piece], "starts": [held], "rows": [len(piece) - 1]}
        bound = {name: torch.tensor(value, device=DEVICE) for name, value in inputs.items()} | caches
        context = contexts[len(piece) == 1]
        for name, tensor in bound.items():
            context.set_input_shape(name, tuple(tensor.shape))
        for name, tensor in (bound | {"logits": logits}).items():
            context.set_tensor_address(name, tensor.data_ptr())
            if name in caches:
                context.set_tensor_address(name.replace("past_key_values", "present"), tensor.data_ptr())
        torch.cuda.synchronize()  # torch has written the inputs on another stream
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT failed; its message is above")
        stream.synchronize()
        held += len(piece)
        if not new:
            made.append(int(logits[0, 0].argmax()))
            new = made[-1:]
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument("--count", type=int, default=20, help="how many tokens to generate")
    args = parser.parse_args()
    print(*generate(args.folder, args.tokens, args.count))
