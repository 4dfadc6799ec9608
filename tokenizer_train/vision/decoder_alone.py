"""Training the decoder of a tokenizer alone: whatever was tokenized with it stays valid.

Encoder, quantiser, codes and the layer before them stay as they are, to the last bit; the layer after the codes and the
decoder learn.
"""

from megatron_ext.vision import CodesOrigin, MoVQGAN
from megatron_ext.vision.movqgan import DECODING_HALF


def train_decoder_alone(model: MoVQGAN) -> None:
    """Let no gradient, weight decay or batch statistic reach what codes depend on, and keep the codes' identity.

    Call it before `model` gets its optimizer.
    """
    model.origin = CodesOrigin(identity=model.identity, encoding_digest=model.encoding_digest)
    for name, module in model.named_children():
        module.requires_grad_(name in DECODING_HALF)
    hold_statistics(model)


def hold_statistics(model: MoVQGAN) -> None:
    """Let the encoder's batch norms use their running statistics, whatever mode the whole is in."""
    model.encoder.eval()
