import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from reference.transformer.batches import Batches, batch_at


@pytest.fixture
def on_disk(tmp_path):
    path = tmp_path / "tokens.bin"
    (np.arange(1003) % 60_000).astype(np.uint16).tofile(path)
    return np.memmap(path, np.uint16, "r")


def test_matches_a_text_in_memory(on_disk):
    text = torch.arange(1003)
    for step in range(5):
        options = {"step": step, "batch_size": 3, "seq_len": 17, "seed": 4}
        read = batch_at(on_disk, **options)
        assert read.dtype == torch.int64 and torch.equal(read, batch_at(text, **options))


def test_matches_a_data_loader(on_disk):
    windows = torch.arange(1000).view(100, 10)
    theirs = [batch.tolist() for batch in DataLoader(windows, batch_size=8, drop_last=True)]
    ours = Batches(on_disk, batch_size=8, seq_len=10, is_shuffled=False)
    assert [batch.tolist() for batch in ours] == theirs and len(ours) == len(theirs) == 12


def test_invariant_an_epoch_has_each_window_once_and_can_be_resumed(on_disk):
    batches = Batches(on_disk, batch_size=10, seq_len=10, seed=1)
    first, second = (torch.cat(list(batches)) for _ in range(2))
    assert not torch.equal(first, second)
    for epoch in (first, second):
        assert torch.equal(epoch.flatten().sort().values, torch.arange(1000))
    again = Batches(on_disk, batch_size=10, seq_len=10, seed=1)
    again.epoch = 1
    assert torch.equal(torch.cat(list(again.batches(start=4))), second[40:])


def test_rejects_texts_and_counts(on_disk):
    with pytest.raises(ValueError, match="text: expected at least 2000 tokens, got 1003"):
        Batches(on_disk, batch_size=2, seq_len=1000)
    with pytest.raises(ValueError, match="seq_len: expected at least 1, got 0"):
        Batches(on_disk, batch_size=2, seq_len=0)
    for text in (on_disk.astype(np.float32), torch.zeros(9), torch.zeros(9, 2, dtype=torch.long)):
        with pytest.raises(TypeError, match="text: expected a row of whole numbers"):
            batch_at(text, step=0, batch_size=1, seq_len=3)
