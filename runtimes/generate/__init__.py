"""Text generation: sampling, stop conditions, tokenizer and the decode loop."""
