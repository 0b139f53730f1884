import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from reference.transformer.schedule import cosine_with_warmup, noam


def test_matches_transformers():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    theirs = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    for step in range(100):
        ours = cosine_with_warmup(step, peak=3e-4, warmup_steps=10, total_steps=100)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_landmarks():
    options = dict(peak=2.0, warmup_steps=4, total_steps=12, final=1.0)
    rates = [cosine_with_warmup(step, **options) for step in (0, 2, 4, 8, 12, 50)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.5, 1.0, 1.0])


def test_no_warmup():
    assert cosine_with_warmup(0, peak=1.0, warmup_steps=0, total_steps=0) == 1.0


def test_matches_the_peaks_of_2017():
    assert noam(4000, dim=512) == pytest.approx(6.99e-4, abs=1e-6)
    assert noam(4000, dim=1024) == pytest.approx(4.94e-4, abs=1e-6)
    assert max(range(1, 9000), key=lambda s: noam(s, dim=512)) == 4000


def test_rejects_steps():
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        cosine_with_warmup(-1, peak=1.0, warmup_steps=1, total_steps=2)
    with pytest.raises(ValueError, match="warmup_steps: expected 0 to total_steps=2, got 3"):
        cosine_with_warmup(0, peak=1.0, warmup_steps=3, total_steps=2)
    with pytest.raises(ValueError, match="step: expected at least 1, got 0"):
        noam(0, dim=8)
