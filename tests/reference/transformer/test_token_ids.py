import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reference.transformer.token_ids import check_token_ids, has_values


def test_accepts_the_whole_vocabulary():
    for dtype in (torch.long, torch.int32, torch.uint8):
        check_token_ids("ids", torch.arange(10, dtype=dtype), 10)
    check_token_ids("ids", torch.zeros(0, dtype=torch.long), 10)
    check_token_ids("ids", torch.tensor([0, -100, 9]), 10, ignored=-100)


@pytest.mark.parametrize("ids", [[0, 10], [-1, 0], [-100]])
def test_rejects_ids_out_of_range(ids):
    with pytest.raises(ValueError, match="ids: expected ids in 0 ... 9, got"):
        check_token_ids("ids", torch.tensor(ids), 10)


def test_rejects_what_is_not_ignored():
    with pytest.raises(ValueError, match="got -99 ... 0; or -100 for none"):
        check_token_ids("labels", torch.tensor([-100, -99]), 10, ignored=-100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_rejects_other_dtypes(dtype):
    with pytest.raises(TypeError, match="ids: expected whole numbers, got torch"):
        check_token_ids("ids", torch.zeros(3, dtype=dtype), 10)


def test_does_not_look_where_nothing_is_to_be_seen():
    check_token_ids("ids", torch.full((3,), 99, device="meta"), 10)
    with FakeTensorMode():
        fake = torch.full((3,), 99)
        assert not has_values(fake)
        check_token_ids("ids", fake, 10)
    assert has_values(torch.zeros(1))
