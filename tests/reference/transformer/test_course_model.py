import math

import torch

from reference.pretrained import corpus
from reference.transformer import llama_parameters, next_token_loss
from reference.transformer.course_model import (
    HELD_OUT,
    SHAPE,
    load_course_model,
    train_course_model,
)


def test_the_stored_model_has_learned_to_read():
    model, tokenizer = load_course_model()
    assert model.config == SHAPE and tokenizer.vocab_size == SHAPE.vocab_size
    assert sum(p.numel() for p in model.parameters()) == llama_parameters(SHAPE).total
    ids = torch.tensor(tokenizer.encode(corpus()[-HELD_OUT:]))[: 8 * 128].view(8, 128)
    with torch.no_grad():
        loss = next_token_loss(model(ids), ids).item()
    assert loss < 0.6 * math.log(SHAPE.vocab_size)  # of a guess among all tokens


def test_training_begins_at_a_guess_and_holds_text_out():
    trainer, tokenizer, held_out = train_course_model()
    assert tokenizer.decode(held_out.tolist()) == corpus()[-HELD_OUT:]
    assert tokenizer.decode(trainer.text.tolist()) == corpus()[:-HELD_OUT]
    assert abs(trainer.step().loss - math.log(SHAPE.vocab_size)) < 0.2


def test_the_stored_tokenizer_is_the_trained_one():
    _, tokenizer, _ = train_course_model()
    assert tokenizer.merges == load_course_model()[1].merges
