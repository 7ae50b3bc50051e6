"""From logits to text: sampling, stopping, tokenizer, generation."""
