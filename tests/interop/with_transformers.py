"""Generate greedy tokens with transformers.

`python with_transformers.py FILE.gguf "[[1, 2]]" COUNT` prints a JSON list.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

file, prompts, count = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
generated = []
for prompt in prompts:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    generated.append(out[0, len(prompt) :].tolist())
print(json.dumps(generated))
