"""A Llama out of earlier chapters' parts, from its configuration to a trained checkpoint.

    model = Llama(LlamaConfig(vocab_size=4096, dim=256, hidden_dim=768, num_layers=4, num_heads=4))
    logits = model(tokens)                     # (B, T) -> (B, T, V)
    loss = next_token_loss(logits, tokens)     # labels: the tokens, -100 where none is predicted

config           the numbers that make one Llama differ from another
presets          those of the published models
model            the decoder
loss             the next token's surprise, padding left out
"""

from reference.transformer.config import LlamaConfig
from reference.transformer.loss import IGNORED, next_token_loss
from reference.transformer.model import Block, Llama, SequenceCache

__all__ = [
    "IGNORED",
    "Block",
    "Llama",
    "LlamaConfig",
    "SequenceCache",
    "next_token_loss",
]
