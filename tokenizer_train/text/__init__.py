"""Training of the text tokenizer of a custom vocabulary."""
