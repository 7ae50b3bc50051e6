"""Generate greedy tokens with Optimum.

`python with_optimum.py FOLDER "[[1, 2]]" COUNT` prints a JSON list.
"""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM

folder, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder, file_name="model.onnx", use_cache=True, use_io_binding=False)
generated = []
for prompt in prompts:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    generated.append(out[0, len(prompt) :].tolist())
print(json.dumps(generated))
