"""Oracles: the figures that the papers print."""

import pytest

from reference.parallel.zero import (
    cross_host_bytes,
    elements_sent,
    model_states_bytes,
    smallest_stage,
)

# ZeRO table 1: GB a rank of 7.5B, 128B and 1T parameters at stages 1, 2, 3.
TABLE_1 = {
    1: [("120", "120", "120"), ("2048", "2048", "2048"), ("16000", "16000", "16000")],
    4: [("52.5", "41.3", "30"), ("896", "704", "512"), ("7000", "5500", "4000")],
    16: [("35.6", "21.6", "7.5"), ("608", "368", "128"), ("4750", "2875", "1000")],
    64: [("31.4", "16.6", "1.88"), ("536", "284", "32"), ("4187", "2218", "250")],
    256: [("30.4", "15.4", "0.47"), ("518", "263", "8"), ("4046", "2054", "62.5")],
    1024: [("30.1", "15.1", "0.12"), ("513", "257", "2"), ("4011", "2013", "15.6")],
}


@pytest.mark.parametrize("world_size", TABLE_1)
def test_matches_table_1_of_zero(world_size):
    """To one unit of the last digit printed: the paper rounds some cells and cuts others."""
    for billions, row in zip((7.5, 128, 1000), TABLE_1[world_size], strict=True):
        for stage, printed in zip((1, 2, 3), row, strict=True):
            gigabytes = model_states_bytes(billions * 1e9, world_size, stage).total / 1e9
            last_digit = 10.0 ** -len(printed.partition(".")[2])
            assert gigabytes == pytest.approx(float(printed), abs=last_digit)


def test_matches_figure_1_of_zero():
    stages = [model_states_bytes(7.5e9, 64, stage).total / 1e9 for stage in range(4)]
    assert stages == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


def test_matches_the_states_of_gpt_2_in_section_3():
    states = model_states_bytes(1.5e9, 1, 0)
    assert (states.total, states.parameters) == (24e9, 3e9)


def test_fsdp_with_float32_shards_has_the_same_sixteen_bytes():
    states = model_states_bytes(1e9, 8, 3, parameter_bytes=4, gradient_bytes=4, optimizer_bytes=8)
    assert states.total == model_states_bytes(1e9, 8, 3).total == 2e9


def test_volumes_of_section_7():
    sent = [elements_sent(1e9, 64, stage) / 1e9 for stage in range(4)]
    assert [s / (63 / 64) for s in sent] == pytest.approx([2, 2, 2, 3])
    assert elements_sent(1e9, 1, 3) == 0


def test_hybrid_sharding_divides_traffic_between_hosts_by_their_size():
    full, replicated, hybrid = (
        cross_host_bytes(1.0, 512, 8, kind) for kind in ("full shard", "replicate", "hybrid")
    )
    assert full / replicated == pytest.approx(1.5)
    assert replicated / hybrid == pytest.approx(8)
    assert hybrid == pytest.approx(0.24951, abs=5e-6)


def test_smallest_stage_that_fits():
    assert smallest_stage(7.5e9, 64, 200e9) == 0
    assert smallest_stage(7.5e9, 64, 80e9) == 1
    assert smallest_stage(7.5e9, 64, 24e9) == 2
    assert smallest_stage(7.5e9, 64, 10e9) == 3
    assert smallest_stage(7.5e9, 64, 1e9) is None


@pytest.mark.parametrize("arguments", [(1e9, 8, 4), (-1, 8, 1), (1e9, 0, 1)])
def test_rejects_what_cannot_be(arguments):
    with pytest.raises(ValueError, match="expected"):
        model_states_bytes(*arguments)


def test_rejects_another_kind_of_sharding():
    with pytest.raises(ValueError, match="kind: expected one of full shard, replicate, hybrid"):
        cross_host_bytes(1.0, 8, 4, "partial")
