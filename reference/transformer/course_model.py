"""A small Llama that this course trained itself, for experiments that a larger model makes slow.

0.9 million parameters, 1,024 tokens of byte-level BPE, trained on the text of Python's language
reference (`reference.pretrained.corpus`) by `python -m reference.transformer.course_model`, which
takes about three minutes on one core; longer runs learn the text by heart and get worse on what is
held out. Chapter 05 trains the same for half as long.
"""

from pathlib import Path

import torch

from reference.pretrained import corpus
from reference.transformer.checkpoint import load_pretrained, save_pretrained
from reference.transformer.config import LlamaConfig
from reference.transformer.fused import fused_causal_attention
from reference.transformer.model import Llama
from reference.transformer.tokenizer import Tokenizer
from reference.transformer.training import Trainer, TrainingConfig

FOLDER = Path(__file__).with_name("course_model")
SHAPE = LlamaConfig(
    vocab_size=1024,
    dim=128,
    hidden_dim=344,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=512,
    is_tied=True,
)
RUN = TrainingConfig(total_steps=600, batch_size=16, seq_len=128, warmup_steps=30)
HELD_OUT = 40_000  # characters at the end of the corpus that are not trained on


def load_course_model() -> tuple[Llama, Tokenizer]:
    """The trained model, float32, in evaluation mode, and its tokenizer.

    Raises: FileNotFoundError where the package was installed without its weights.
    """
    return load_pretrained(FOLDER).float().eval(), Tokenizer.load(FOLDER / "tokenizer.json")


def train_course_model(
    run: TrainingConfig = RUN, *, seed: int = 0
) -> tuple[Trainer, Tokenizer, torch.Tensor]:
    """A trainer that has not begun, its tokenizer, and the ids of the text that is held out."""
    text = corpus()
    tokenizer = Tokenizer.train(text[:-HELD_OUT], vocab_size=SHAPE.vocab_size)
    torch.manual_seed(seed)
    trainer = Trainer(
        Llama(SHAPE),
        torch.tensor(tokenizer.encode(text[:-HELD_OUT])),
        run,
        attend=fused_causal_attention,
    )
    return trainer, tokenizer, torch.tensor(tokenizer.encode(text[-HELD_OUT:]))


def main() -> None:
    """Train the whole run and write weights (bfloat16) and tokenizer."""
    torch.set_num_threads(1)
    trainer, tokenizer, _ = train_course_model()
    trainer.run()
    save_pretrained(trainer.model.bfloat16(), FOLDER)
    tokenizer.save(FOLDER / "tokenizer.json")


if __name__ == "__main__":
    main()
