"""A Llama out of earlier chapters' parts, from its configuration to a trained checkpoint.

    model = Llama(LlamaConfig(vocab_size=4096, dim=256, hidden_dim=768, num_layers=4, num_heads=4))
    logits = model(tokens)                     # (B, T) -> (B, T, V)
    loss = next_token_loss(logits, tokens)     # labels: the tokens, -100 where none is predicted

config           the numbers that make one Llama differ from another
presets          those of the published models
parameters       where the parameters are, of Llama and of the models before it
model            the decoder
fused            torch's fused kernel, for `attend=`
loss             the next token's surprise, padding left out
flops            FLOPs a token, and what share of a machine that is
checkpoint       folders of config.json and safetensors, as transformers reads and writes them
shards           which tensor is in which of its files
huggingface      the configuration in transformers' words
tokenizer        text to ids: byte-level BPE
optimizer        AdamW, clipping        schedule   the learning rate over a run
batches          from a text in memory or on disk
training         steps, checkpoint and resume
resume           a run of any module and optimizer, saved and taken up again
sampling         from logits to tokens
generation_config   how a model's makers have it write
course_model     a small trained Llama that later chapters use
encoder_decoder  the transformer of 2017
"""

from reference.transformer.checkpoint import load_config, load_pretrained, save_pretrained
from reference.transformer.config import LlamaConfig
from reference.transformer.flops import (
    forward_flops,
    model_flops_utilization,
    six_n,
    training_flops_per_token,
)
from reference.transformer.fused import fused_causal_attention
from reference.transformer.generation_config import (
    GenerationSettings,
    load_generation_settings,
    save_generation_settings,
)
from reference.transformer.huggingface import from_huggingface, to_huggingface
from reference.transformer.loss import IGNORED, cross_entropy, next_token_loss
from reference.transformer.model import Block, Llama, SequenceCache
from reference.transformer.parameters import (
    LlamaParameters,
    MixtureParameters,
    bert_parameters,
    encoder_decoder_parameters,
    gpt_parameters,
    llama_parameters,
    mixtral_parameters,
)
from reference.transformer.presets import PRESETS
from reference.transformer.resume import load_run, save_run

__all__ = [
    "IGNORED",
    "PRESETS",
    "Block",
    "GenerationSettings",
    "Llama",
    "LlamaConfig",
    "LlamaParameters",
    "MixtureParameters",
    "SequenceCache",
    "bert_parameters",
    "cross_entropy",
    "encoder_decoder_parameters",
    "forward_flops",
    "from_huggingface",
    "fused_causal_attention",
    "gpt_parameters",
    "llama_parameters",
    "load_config",
    "load_generation_settings",
    "load_pretrained",
    "load_run",
    "mixtral_parameters",
    "model_flops_utilization",
    "next_token_loss",
    "save_generation_settings",
    "save_pretrained",
    "save_run",
    "six_n",
    "to_huggingface",
    "training_flops_per_token",
]
