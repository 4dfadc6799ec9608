"""Training of the two tokenizers that come before the decoder: text (SentencePiece) and vision (MoVQGAN)."""
