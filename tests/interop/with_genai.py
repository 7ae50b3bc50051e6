"""Generate greedy tokens with onnxruntime-genai.

`python with_genai.py FOLDER "[[1, 2]]" COUNT` prints a JSON list.
"""

import json
import sys

import numpy as np
import onnxruntime_genai as og

folder, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder)


def greedy(prompt: list[int]) -> list[int]:
    params = og.GeneratorParams(model)
    # Without a minimum length, it stops at an end-of-text token.
    params.set_search_options(max_length=len(prompt) + count, min_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([prompt], np.int32))
    tokens: list[int] = []
    while len(tokens) < count:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


print(json.dumps([greedy(prompt) for prompt in prompts]))
