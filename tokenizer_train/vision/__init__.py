"""Training of the Emu3 vision tokenizer."""
