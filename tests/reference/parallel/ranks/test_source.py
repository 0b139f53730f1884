"""Messages quote the program's line, whatever of the library stands between."""

import contextlib
import os
import textwrap

import torch
from torch import nn

from reference.parallel.data_parallel import DDP
from reference.parallel.ranks import CollectiveMismatch, run
from reference.transformer import Llama, LlamaConfig, next_token_loss

HERE = os.path.basename(__file__)
CONFIG = LlamaConfig(vocab_size=7, dim=8, hidden_dim=8, num_layers=1, num_heads=2, max_seq_len=4)


def caught_on_both(program):
    """The text that each of two ranks catches."""

    def on_rank(comm):
        try:
            program(comm)
        except CollectiveMismatch as error:
            return str(error)

    texts = run(2, on_rank).results
    assert texts[0] == texts[1]
    return texts[0]


def test_a_hook_of_ddp_quotes_the_line_of_backward():
    def program(comm):
        model = DDP(nn.Linear(2, 2), comm)
        if comm.rank == 1:
            comm.barrier()
        else:
            model(torch.ones(1, 2)).sum().backward()

    text = caught_on_both(program)
    assert f"at {HERE}:" in text and "model(torch.ones(1, 2)).sum().backward()" in text
    assert "asked by" in text and "ddp.py" not in text


def test_a_model_of_the_librarys_is_not_the_program():
    def program(comm):
        model = Llama(CONFIG)
        for module in model.modules():
            module.register_forward_hook(lambda *_: comm.all_reduce(torch.ones(1 + comm.rank)))
        tokens = torch.zeros(1, 3, dtype=torch.long)
        next_token_loss(model(tokens), tokens)

    text = caught_on_both(program)
    assert f"at {HERE}:" in text and "lambda *_: comm.all_reduce" in text


def test_a_context_manager_of_the_standard_librarys_is_passed_over():
    def program(comm):
        with contextlib.ExitStack() as stack:
            stack.callback(comm.all_reduce, torch.ones(1 + comm.rank))

    text = caught_on_both(program)
    assert f"at {HERE}:" in text and "contextlib.py" not in text


def test_a_program_that_was_read_from_a_string():
    """A cell of a notebook has a name of its own and no file."""
    code = "def program(comm):\n    comm.all_reduce(torch.ones(1 + comm.rank))\n"
    names = {"torch": torch}
    exec(compile(textwrap.dedent(code), "<cell 3>", "exec"), names)
    assert "<cell 3>:2 in program" in caught_on_both(names["program"])
