import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference.flash_attention.accesses import (
    CountedArray,
    naive,
    online,
    online_top_k,
    safe,
    top_k,
)

scores = st.lists(st.integers(-50, 50).map(float), min_size=1, max_size=60, unique=True)


@pytest.mark.parametrize("softmax, per_element", [(naive, 3), (safe, 4), (online, 3)])
def test_counts_match_the_paper(softmax, per_element):
    x, y = CountedArray(torch.arange(50.0).tolist()), CountedArray([0.0] * 50)
    softmax(x, y)
    assert x.accesses + y.accesses == per_element * 50
    torch.testing.assert_close(torch.tensor(y.values), torch.arange(50.0).softmax(0))


def test_counts_with_top_k_match_the_paper():
    for softmax, expected in ((safe, 5), (online, 4)):
        x, y = CountedArray(torch.arange(40.0).tolist()), CountedArray([0.0] * 40)
        softmax(x, y)
        top_k(y, 3)
        assert x.accesses + y.accesses == expected * 40
    x = CountedArray(torch.arange(40.0).tolist())
    online_top_k(x, 3)
    assert x.accesses == 40


@given(scores, st.integers(1, 10))
def test_fused_top_k_matches_torch(values, k):
    k = min(k, len(values))
    probabilities, places = torch.tensor(values, dtype=torch.float64).softmax(0).topk(k)
    got = online_top_k(CountedArray(values), k)
    torch.testing.assert_close(torch.tensor([p for p, _ in got]).double(), probabilities)
    ours = torch.tensor(values, dtype=torch.float64)[[i for _, i in got]]
    assert torch.equal(ours, torch.tensor(values, dtype=torch.float64)[places])
