import dataclasses

import pytest
import torch

from reference.transformer import Llama, LlamaConfig, fused_causal_attention, next_token_loss
from reference.transformer.training import Trainer, TrainingConfig, batch_at

SHAPE = LlamaConfig(
    vocab_size=17, dim=16, hidden_dim=24, num_layers=2, num_heads=2, max_seq_len=16, is_tied=True
)
RUN = TrainingConfig(total_steps=8, batch_size=4, seq_len=12, warmup_steps=2, peak_lr=0.01)
TEXT = torch.arange(400) * 7 % 17


def trainer(run=RUN, shape=SHAPE, **options):
    torch.manual_seed(0)
    return Trainer(Llama(shape), TEXT, run, **options)


def weights(t):
    return torch.cat([p.detach().flatten() for p in t.model.parameters()])


def test_learns_a_text_that_repeats():
    run = dataclasses.replace(RUN, total_steps=80)
    history = trainer(run, attend=fused_causal_attention).run()
    assert history[0].loss == pytest.approx(torch.tensor(17.0).log().item(), rel=0.1)
    assert history[-1].loss < 0.5
    assert all(step.grad_norm > 0 for step in history)


def test_resumed_run_equals_the_uninterrupted_bit_for_bit(tmp_path):
    whole = trainer()
    whole.run()
    first = trainer()
    first.run(until=3)
    first.save(tmp_path / "run.safetensors")
    second = Trainer(Llama(SHAPE), TEXT, RUN)  # other initial weights
    second.load(tmp_path / "run.safetensors")
    second.run()
    assert second.history == whole.history
    assert torch.equal(weights(second), weights(whole))
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_accumulation_equals_a_large_batch():
    small = trainer(dataclasses.replace(RUN, batch_size=2, accumulation=2, max_norm=1e9))
    small.step()
    large = trainer(dataclasses.replace(RUN, batch_size=4, max_norm=1e9))
    tokens = torch.cat([batch_at(TEXT, step=i, batch_size=2, seq_len=12) for i in range(2)])
    loss = next_token_loss(large.model(tokens), tokens)
    loss.backward()
    large._learning_rate()
    large.optimizer.step()
    assert small.history[0].loss == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(weights(small), weights(large), rtol=0, atol=1e-5)


def test_batches_are_windows_of_the_text_and_repeat():
    text = torch.arange(50)
    batch = batch_at(text, step=3, batch_size=100, seq_len=5)
    assert torch.equal(batch.diff(dim=1), torch.ones(100, 4, dtype=torch.long))
    assert batch.min() == 0 and batch.max() == 49
    assert torch.equal(batch, batch_at(text, step=3, batch_size=100, seq_len=5))
    assert not torch.equal(batch, batch_at(text, step=4, batch_size=100, seq_len=5))
    assert batch_at(text[:5], step=0, batch_size=2, seq_len=5).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_follows_the_schedule():
    rates = [step.lr for step in trainer().run()]
    assert rates[1] == RUN.peak_lr and rates[-1] == pytest.approx(RUN.final_lr)
    assert RUN.tokens_per_step == 48


def test_rejects_files_that_do_not_fit(tmp_path):
    path = tmp_path / "run.safetensors"
    before = trainer()
    before.run(until=1)
    before.save(path)
    whole = path.read_bytes()
    cases = [
        (trainer(dataclasses.replace(RUN, seed=1)), whole, "expected the run"),
        (trainer(shape=dataclasses.replace(SHAPE, dim=32)), whole, "expected .*weight"),
        (trainer(), whole[: len(whole) // 2], "cut or foreign"),
        (trainer(), b"", "cut or foreign"),
    ]
    for target, content, message in cases:
        path.write_bytes(content)
        kept = weights(target)
        with pytest.raises(ValueError, match=message):
            target.load(path)
        assert torch.equal(weights(target), kept) and target.history == []
    import safetensors.torch

    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="got other tensors"):
        trainer().load(path)


def test_rejects_counts_and_short_texts():
    with pytest.raises(ValueError, match="accumulation: expected at least 1"):
        dataclasses.replace(RUN, accumulation=0)
    with pytest.raises(ValueError, match="text: expected at least 9 tokens, got 5"):
        batch_at(torch.arange(5), step=0, batch_size=1, seq_len=9)
