"""Oracles: SDPA on one rank in float64; torch's ring attention on gloo; the ledgers."""

import functools

import pytest
import torch
from torch.testing import assert_close

from reference.parallel.context import (
    ContextParallel,
    Kernel,
    attention_bytes,
    gathered_attention,
    heads_from_positions,
    least_part,
    positions,
    positions_from_heads,
    ring_attention,
    ring_forward_seconds,
    ulysses_attention,
)
from reference.parallel.ranks import CLASSROOM, run
from tests.reference.parallel.context.workload import LAYOUTS, in_parts, inputs, one_rank
from tests.tolerances import TOLERANCE

METHODS = {
    "ring": {},
    "gathered": {"keys": "gathered"},
    "ulysses": {"num_ulysses": -1},
    "ulysses x ring": {"num_ulysses": 2},
    "ulysses x gathered": {"num_ulysses": 2, "keys": "gathered"},
}


def divided(num_ranks, method, given, **options):
    chosen = METHODS[method] | options
    if chosen.get("num_ulysses") == -1:
        chosen["num_ulysses"] = num_ranks
    program = functools.partial(in_parts, given=given, **chosen)
    return run(num_ranks, program, is_measured=False).results


def assert_same(done, truth, tolerance=TOLERANCE[torch.float64]):
    for found in done:
        for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, truth, strict=True):
            assert_close(ours.double(), theirs, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "num_ranks, method",
    [(1, "ring"), (1, "ulysses"), *((4, method) for method in METHODS), (8, "ulysses x ring")],
)
def test_matches_one_rank(num_ranks, method, layout):
    """Values and gradients, causal, grouped queries: fewer key/value heads than ranks."""
    given = inputs()
    assert_same(divided(num_ranks, method, given, layout=layout), one_rank(*given))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["ulysses", "ring", "gathered"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_matches_one_rank_in_the_layout_of_the_kernel(method, layout, is_causal):
    """The three functions take the same parts of a text: Ulysses as well has them in zigzag."""
    given = inputs()
    function = {"ring": ring_attention, "gathered": gathered_attention,
                "ulysses": ulysses_attention}[method]  # fmt: skip

    def program(comm):
        length = given[0].shape[2]
        held = [positions(layout, length, rank, comm.size) for rank in range(comm.size)]
        *qkv, grad = (x[:, :, held[comm.rank]] for x in given)
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = function(*leaves, comm, Kernel(is_causal=is_causal, layout=layout))
        out.backward(grad)
        order = torch.cat(held).argsort()
        return [
            comm.all_gather(x.transpose(0, 2).contiguous())[order].transpose(0, 2)
            for x in (out.detach(), *(leaf.grad for leaf in leaves))
        ]

    assert_same(run(4, program, is_measured=False).results, one_rank(*given, is_causal=is_causal))


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("method", ["ulysses", "ulysses x ring"])
def test_matches_one_rank_for_any_number_of_kv_heads(method, kv_heads):
    given = inputs(heads=8, kv_heads=kv_heads, batch=1)
    assert_same(divided(4, method, given), one_rank(*given))


@pytest.mark.parametrize("method", ["ring", "gathered", "ulysses"])
def test_matches_one_rank_without_a_mask(method):
    given = inputs()

    def program(comm):
        function = {"ring": ring_attention, "gathered": gathered_attention,
                    "ulysses": ulysses_attention}[method]  # fmt: skip
        *qkv, grad = (x.chunk(comm.size, 2)[comm.rank] for x in given)
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = function(*leaves, comm, Kernel(is_causal=False))
        out.backward(grad)
        found = [out.detach(), *(leaf.grad for leaf in leaves)]
        return [comm.all_gather(x.transpose(0, 2).contiguous()).transpose(0, 2) for x in found]

    assert_same(run(4, program, is_measured=False).results, one_rank(*given, is_causal=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["ring", "gathered"])
def test_matches_one_rank_in_other_dtypes(method, dtype):
    given = inputs(dtype=dtype)
    done = divided(2, method, given)
    assert {x.dtype for x in done[0]} == {dtype}
    assert_same(done, one_rank(*given), TOLERANCE[dtype])


def test_one_position_a_rank_large_scores_and_values_of_another_width():
    """Scores of hundreds: exp overflows without the log-sum-exp. dv != d travels too."""
    q, k, _, _ = inputs(seq_len=4, batch=1)
    v, grad = inputs(seq_len=4, batch=1, width=7)[2:]
    given = q * 30, k * 30, v, grad
    done = divided(4, "ring", given, layout="striped")
    assert torch.isfinite(done[0][0]).all()
    assert_same(done, one_rank(*given), {"rtol": 1e-9, "atol": 1e-9})


def test_blocks_do_not_matter():
    given = inputs(seq_len=20)
    assert_same(divided(2, "ring", given, block_size=3), one_rank(*given))


def test_transposes_are_inverse_and_each_others_backward():
    x = inputs()[0]

    def program(comm):
        leaf = x.chunk(comm.size, 2)[comm.rank].clone().requires_grad_()
        heads = heads_from_positions(leaf, comm)
        mine = x.chunk(comm.size, 1)[comm.rank]
        back = positions_from_heads(heads, comm)
        heads.backward(mine * 2)
        return torch.equal(heads, mine), torch.equal(back, leaf), torch.equal(leaf.grad, leaf * 2)

    assert run(4, program).results == [(True, True, True)] * 4


def theirs(comm, ring, given, is_balanced, rotation):
    """torch's ring with the CPU's flash kernel, forward and backward, beside ours."""
    import torch.distributed as dist

    aten = torch.ops.aten
    ring._cp_options.enable_load_balance = is_balanced
    ring.set_rotate_method(rotation)
    layout = "zigzag" if is_balanced else "contiguous"
    place = positions(layout, given[0].shape[2], comm.rank, comm.size)
    q, k, v, grad = (x[:, :, place].contiguous() for x in given)
    out, lse = ring._templated_ring_attention(
        dist.group.WORLD, 2, aten._scaled_dot_product_flash_attention_for_cpu, q, k, v,
        is_causal=True,
    )  # fmt: skip
    grads = ring._templated_ring_attention_backward(
        dist.group.WORLD, 2, aten._scaled_dot_product_flash_attention_for_cpu_backward, grad,
        "grad_out", q, k, v, out, lse, is_causal=True, dropout_p=0.0,
    )  # fmt: skip
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    ours = ring_attention(*mine, comm, Kernel(layout=layout))
    ours.backward(grad)
    return [(out, ours.detach()), *zip(grads, (x.grad for x in mine), strict=True)]


def test_matches_torch_ring_attention():
    """Two gloo processes, ours and torch's on the same parts: balanced or not, either rotation."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    given = inputs(kv_heads=4, dtype=torch.float32)

    def program(comm):
        return [
            pair
            for options in ((True, "alltoall"), (False, "allgather"))
            for pair in theirs(comm, _attention, given, *options)
        ]

    for pairs in run(2, program, backend="processes", is_measured=False).results:
        assert len(pairs) == 8
        for found, ours in pairs:
            assert_close(ours, found, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("method", list(METHODS))
def test_matches_on_processes(method):
    """The same program on gloo gives what simulated ranks do."""
    given = inputs()
    chosen = METHODS[method] | ({"num_ulysses": 2} if "ulysses" in method else {})
    program = functools.partial(in_parts, given=given, **chosen)
    simulated, real = (
        run(2, program, backend=b, is_measured=False).results for b in ("simulated", "processes")
    )
    for ours, found in zip(simulated, real, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, found, strict=True))


SHAPE = {"batch": 2, "seq_len": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}


@pytest.mark.parametrize("method", ["ring", "gathered", "ulysses"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_traffic_matches_the_formula(method, num_ranks):
    given = inputs(seq_len=32, dtype=torch.bfloat16)

    def program(comm):
        context = ContextParallel(
            comm, keys="gathered" if method == "gathered" else "ring",
            num_ulysses=comm.size if method == "ulysses" else 1,
        )  # fmt: skip
        *qkv, grad = (context.part(x, 2) for x in given)
        leaves = [x.requires_grad_() for x in qkv]
        out = context.attend(*leaves)
        forward = comm.traffic.total().wire_bytes
        out.backward(grad)
        return forward, comm.traffic.total().wire_bytes - forward

    wide = {} if method == "ulysses" else {"gradient_bytes": 4}
    expected = tuple(
        attention_bytes(method, **SHAPE, num_ranks=num_ranks, is_backward=b, **wide)
        for b in (False, True)
    )
    assert run(num_ranks, program).results == [expected] * num_ranks


def test_ulysses_falls_and_the_ring_does_not():
    """Ulysses' paper, sec. 3.2: 4 N h / P a link, a constant where ranks grow with the text."""
    shape = {"batch": 1, "num_heads": 64, "num_kv_heads": 64, "head_dim": 128}
    for p in (4, 16, 64):
        sent = attention_bytes("ulysses", **shape, seq_len=65536, num_ranks=p)
        assert sent == 4 * 65536 * 8192 / p * 2 * (p - 1) / p
        ring = attention_bytes("ring", **shape, seq_len=65536, num_ranks=p)
        assert ring == 2 * 65536 * 8192 * 2 * (p - 1) / p


@pytest.mark.parametrize(
    "flops, bandwidth, published, tolerance",
    [
        (312e12, 300e9, 1.0, 0.05), (312e12, 12.5e9, 24.5, 0.02), (123e12, 112e9, 1.1, 0.05),
        (275e12, 268e9, 1.0, 0.05), (196e12, 186e9, 1.1, 0.05),
    ],
)  # fmt: skip
def test_least_part_matches_the_paper(flops, bandwidth, published, tolerance):
    """Table 2 of Ring Attention, thousands of positions."""
    assert least_part(flops, bandwidth) / 1e3 == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize("seq_len", [32, 128, 512])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_clock_matches_the_formula(seq_len, kv_heads):
    """Short parts wait for messages, long ones hide them."""
    given = inputs(batch=1, kv_heads=kv_heads, seq_len=seq_len, width=64, dtype=torch.float32)

    def program(comm):
        parts = [x.chunk(comm.size, 2)[comm.rank] for x in given[:3]]
        ring_attention(*parts, comm, Kernel(is_causal=False))

    took = run(4, program, hardware=CLASSROOM).trace.seconds
    shape = {"num_heads": 4, "num_kv_heads": kv_heads, "head_dim": 64, "batch": 1}
    formula = ring_forward_seconds(
        CLASSROOM, **shape, seq_len=seq_len, num_ranks=4, element_bytes=4
    )
    assert took == pytest.approx(formula, rel=1e-9)


def test_the_ring_holds_two_parts_and_gathering_all():
    given = inputs(seq_len=128, batch=1, heads=2, kv_heads=2, width=32, dtype=torch.float32)

    def program(comm, attend):
        parts = [x.chunk(comm.size, 2)[comm.rank].clone() for x in given[:3]]
        comm.memory.reset_peak()
        attend(*parts, comm, Kernel(block_size=16))
        return comm.memory.use.peak["communication_buffers"]

    part = given[0].nbytes // 8
    # One part of keys and values arrives; the one in use has arrived before.
    assert run(8, program, ring_attention).results == [2 * 2 * part] * 8
    assert run(8, program, gathered_attention).results == [8 * 2 * part] * 8


def test_backward_keeps_no_keys_but_its_own():
    given = inputs(seq_len=256, batch=1, heads=2, kv_heads=2, width=32, dtype=torch.float32)

    def program(comm, attend):
        leaves = [
            x.chunk(comm.size, 2)[comm.rank].clone().requires_grad_() for x in given[:3]
        ]  # fmt: skip
        before = comm.memory.use.current_bytes
        out = attend(*leaves, comm, Kernel())
        return comm.memory.use.current_bytes - before - out.nbytes, out[..., 0].nbytes

    for attend in (ring_attention, gathered_attention):
        for kept, lse in run(4, program, attend).results:
            assert kept == lse


def test_rejects():
    q, k, v, _ = inputs()

    def call(function, *args, **options):
        return run(3, lambda comm: function(*args, comm, **options))

    with pytest.raises(ValueError, match="expected a multiple of 3 heads, the number of ranks, g"):
        call(heads_from_positions, q)
    with pytest.raises(ValueError, match="expected a multiple of 3 positions, the number of rank"):
        call(positions_from_heads, q)
    with pytest.raises(ValueError, match="k: expected this rank's 16 positions, as q, got 8"):
        call(ring_attention, q, k[:, :, :8], v[:, :, :8])
    with pytest.raises(TypeError, match="one floating dtype"):
        call(gathered_attention, q, k.float(), v)
    with pytest.raises(ValueError, match="num_ranks: expected at most 4, the number of query hea"):
        attention_bytes("ulysses", **SHAPE, num_ranks=8)
    with pytest.raises(ValueError, match="method: expected ulysses, ring or gathered, got 'sta"):
        attention_bytes("star", **SHAPE, num_ranks=8)
