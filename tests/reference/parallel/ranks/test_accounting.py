"""Traffic, time and memory of a program, against closed forms and torch's own counters."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reference.parallel.ranks import (
    CLASSROOM,
    DGX_A100,
    DGX_H100,
    Link,
    run,
    to_device,
    to_host,
)

SIZES = st.integers(1, 40)
ALPHA, BANDWIDTH = CLASSROOM.intra.latency_seconds, CLASSROOM.intra.bytes_per_second


def sent(n, call):
    """Wire bytes of each rank."""
    done = run(n, call, is_measured=False)
    return [done.trace.total(rank=r).wire_bytes for r in range(n)], done


class TestTraffic:
    @settings(max_examples=20, deadline=None)
    @given(n=st.integers(1, 12), rows=SIZES)
    def test_matches_closed_forms(self, n, rows):
        size = 4 * n * rows  # bytes of a float32 vector that n divides

        def x():
            return torch.ones(n * rows)

        part = (n - 1) / n * size
        assert sent(n, lambda c: c.all_reduce(x()))[0] == pytest.approx([2 * part] * n)
        assert sent(n, lambda c: c.reduce_scatter(x()))[0] == pytest.approx([part] * n)
        assert sent(n, lambda c: c.all_gather(x()[:rows]))[0] == pytest.approx([part] * n)
        assert sent(n, lambda c: c.all_to_all(x()))[0] == pytest.approx([part] * n)
        assert sum(sent(n, lambda c: c.broadcast(x(), 0))[0]) == (n - 1) * size
        assert sum(sent(n, lambda c: c.reduce(x(), n - 1))[0]) == (n - 1) * size
        assert sent(n, lambda c: c.gather(x()[:rows], 0))[0][0] == 0
        whole, done = sent(n, lambda c: c.scatter(torch.empty(rows), x(), src=0))
        assert whole[0] == pytest.approx(part) and sum(whole[1:]) == 0
        assert done.trace.total(rank=0).payload_bytes == size
        assert sent(n, lambda c: c.barrier())[0] == [0] * n

    @pytest.mark.parametrize("n", [2, 8, 64])
    def test_ring_sends_twice_the_payload_whatever_the_number_of_ranks(self, n):
        wire, _ = sent(n, lambda c: c.all_reduce(torch.ones(1 << 12)))
        assert wire == pytest.approx([2 * (n - 1) / n * 4 * (1 << 12)] * n)

    def test_matrix_agrees_with_rows(self):
        def program(comm):
            comm.all_reduce(torch.ones(9))
            comm.all_to_all(
                torch.ones(6), input_splits=[1, 2, 3], output_splits=[comm.rank + 1] * 3
            )
            if comm.rank == 0:
                comm.send(torch.ones(5), 2)
            if comm.rank == 2:
                comm.recv(torch.empty(5), 0)

        trace = run(3, program).trace
        matrix = trace.traffic_matrix()
        for rank in range(3):
            assert sum(matrix[rank]) == pytest.approx(trace.total(rank=rank).wire_bytes)
            assert matrix[rank][rank] == 0
        assert matrix[1][0] == 4 * 1 and matrix[2][1] == 4 * 2

    def test_rows_by_group_and_operation_and_reset(self):
        def program(comm):
            pair = comm.split(comm.rank // 2, name=f"pair{comm.rank // 2}")
            comm.all_reduce(torch.ones(4))
            comm.traffic.reset()
            for _ in range(3):
                pair.all_reduce(torch.ones(4))
            comm.all_gather(torch.ones(1))
            total = comm.traffic.total(operation="all_reduce")
            return total.num_calls, total.payload_bytes, total.wire_bytes

        done = run(4, program)
        assert done.results == [(3, 48, 48.0)] * 4
        assert done.trace.total(group="pair1").num_calls == 6
        assert done.trace.total(rank=0).num_calls == 4
        assert {row.group for row in done.trace.traffic()} == {"pair0", "pair1", "world"}

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
    def test_bytes_follow_the_dtype(self, dtype):
        wire, _ = sent(2, lambda c: c.all_gather(torch.ones(8, dtype=dtype)))
        assert wire == [8 * dtype.itemsize] * 2


class TestClock:
    @pytest.mark.parametrize("n", [2, 3, 8])
    @pytest.mark.parametrize("size", [8 * 3 * 1000, 8 * 3 * 10**6])
    def test_all_reduce_matches_alpha_beta(self, n, size):
        done = run(n, lambda c: c.all_reduce(torch.ones(size)), hardware=CLASSROOM)
        expected = 2 * (n - 1) * ALPHA + 2 * (n - 1) / n * 4 * size / BANDWIDTH
        assert done.trace.seconds == pytest.approx(expected)

    @pytest.mark.parametrize("n", [2, 4, 8])
    def test_other_collectives_match_alpha_beta(self, n):
        def seconds(call):
            return run(n, call, hardware=CLASSROOM).trace.seconds

        size, steps = 4 * 8 * 1000, n - 1
        x = torch.ones(8 * 1000)
        share = steps / n * size / BANDWIDTH
        assert seconds(lambda c: c.reduce_scatter(x)) == pytest.approx(steps * ALPHA + share)
        assert seconds(lambda c: c.all_to_all(x)) == pytest.approx(steps * ALPHA + share)
        whole = steps * ALPHA + size / BANDWIDTH
        assert seconds(lambda c: c.broadcast(x, 0)) == pytest.approx(whole)

    def test_a_message_pays_latency_and_bytes_of_its_link(self):
        def program(comm):
            if comm.rank == 0:
                comm.send(torch.ones(1000), 1)
                comm.send(torch.ones(1000), 8)
            elif comm.rank in (1, 8):
                comm.recv(torch.empty(1000), 0)
            return comm.now_seconds

        near = ALPHA + 4000 / BANDWIDTH
        inter = CLASSROOM.inter
        far = inter.latency_seconds + 4000 / inter.bytes_per_second
        times = run(9, program, hardware=CLASSROOM).results
        assert times[1] == pytest.approx(near) and times[8] == pytest.approx(near + far)

    def test_a_ring_over_two_nodes_is_as_fast_as_all_adapters_together(self):
        size = 16 * 10**5
        done = run(16, lambda c: c.all_reduce(torch.ones(size)), hardware=CLASSROOM)
        inter = CLASSROOM.inter
        bandwidth = min(BANDWIDTH, 8 * inter.bytes_per_second)
        latency = 2 * (inter.latency_seconds + 14 * ALPHA)
        assert done.trace.seconds == pytest.approx(latency + 2 * 15 / 16 * 4 * size / bandwidth)

    def test_counted_flops_take_time_and_match_torchs_counter(self):
        def work():
            layer = nn.Linear(32, 64)
            layer(torch.ones(16, 32)).sum().backward()

        with FlopCounterMode(display=False) as counter:
            work()
        done = run(1, lambda comm: work(), hardware=CLASSROOM)
        assert done.trace.seconds == pytest.approx(counter.get_total_flops() / 1e12)

    def test_attention_is_counted_where_torchs_counter_leaves_it_out(self):
        def work(comm):
            q = torch.ones(2, 4, 16, 8)
            nn.functional.scaled_dot_product_attention(q, q, q)

        done = run(1, work, hardware=CLASSROOM)
        assert done.trace.seconds == pytest.approx(2 * 4 * 2 * (2 * 16 * 16 * 8) / 1e12)

    def test_overlap_hides_the_shorter_of_the_two(self):
        """Work of 2 ms beside an all-reduce of t: max, not sum; and one after the other: sum."""
        size = 10**6
        alone = 2 * ALPHA + 4 * size / BANDWIDTH

        def overlapped(comm, flops):
            handle = comm.all_reduce(torch.ones(size), async_op=True)
            comm.compute(flops)
            handle.wait()

        def in_turn(comm, flops):
            comm.all_reduce(torch.ones(size))
            comm.compute(flops)

        for flops in (1e8, 2e9):
            together = run(2, overlapped, flops, hardware=CLASSROOM).trace
            apart = run(2, in_turn, flops, hardware=CLASSROOM).trace
            assert together.seconds == pytest.approx(max(alone, flops / 1e12))
            assert apart.seconds == pytest.approx(alone + flops / 1e12)
        assert together.idle_fraction(0) == pytest.approx(0)
        assert apart.busy_seconds(0) == pytest.approx(2e-3)

    def test_waits_for_the_slowest(self):
        def program(comm):
            comm.compute(1e9 * comm.rank)
            comm.barrier()
            return comm.now_seconds

        times = run(3, program, hardware=CLASSROOM).results
        assert times == pytest.approx([2e-3 + 2 * 2 * ALPHA] * 3)

    def test_operations_of_one_group_queue_and_of_two_groups_do_not(self):
        one = 2 * ALPHA + 4e6 / BANDWIDTH

        def program(comm, is_same):
            other = comm if is_same else comm.split(0, name="other")
            handles = [g.all_reduce(torch.ones(10**6), async_op=True) for g in (comm, other)]
            for handle in handles:
                handle.wait()
            return comm.now_seconds

        assert run(2, program, True, hardware=CLASSROOM).results[0] == pytest.approx(2 * one)
        assert run(2, program, False, hardware=CLASSROOM).results[0] == pytest.approx(one)

    def test_profiles_are_the_vendors(self):
        assert DGX_A100.intra.bytes_per_second == 600e9 / 2
        assert DGX_H100.intra.bytes_per_second == 900e9 / 2
        assert DGX_H100.flops_per_second == 1979e12 / 2
        assert DGX_A100.inter.bytes_per_second == 200e9 / 8
        assert DGX_H100.node(15) == 1

    def test_another_machine_is_a_replace_away(self):
        slow = dataclasses.replace(CLASSROOM, intra=Link(1e-3, 1e6))
        done = run(2, lambda c: c.all_reduce(torch.ones(250)), hardware=slow)
        assert done.trace.seconds == pytest.approx(2e-3 + 1e-3)


class TestMemory:
    def test_categories_of_a_training_step(self):
        def program(comm):
            model = nn.Linear(64, 32, bias=False)
            optimizer = torch.optim.Adam(model.parameters())
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.ones(4, 64)).square().sum().backward()
                comm.all_reduce(model.weight.grad)
                optimizer.step()
            return dict(comm.memory.use.current)

        p = 4 * 64 * 32
        held = run(2, program).results[0]
        assert held["parameters"] == p and held["gradients"] == p
        assert held["optimizer_states"] == pytest.approx(2 * p, abs=64)

    def test_views_count_once_and_dead_tensors_not_at_all(self):
        def program(comm):
            x = torch.ones(1000)
            views = [x[:10], x.view(10, 100), x.detach()]
            with_views = comm.memory.use.current_bytes
            del x, views
            return with_views, comm.memory.use.current_bytes

        assert run(1, program).results == [(4000, 0)]

    def test_autograd_keeps_what_it_saves(self):
        def program(comm):
            x = torch.ones(1000, requires_grad=True)
            y = x.exp().sin().sum()
            before = comm.memory.use.current["activations"]
            y.backward()
            return before

        # x, exp(x) (saved by both) and the scalar; sin's output is not saved.
        assert run(1, program).results == [3 * 4000 - 4000 + 4]

    def test_peak_and_its_reset(self):
        def program(comm):
            torch.ones(1000)
            comm.memory.reset_peak()
            x = torch.ones(100)
            use = comm.memory.use
            del x
            return use.peak_bytes, use.at_peak["activations"]

        assert run(1, program).results == [(400, 400)]

    def test_ranks_have_their_own_ledgers(self):
        def program(comm):
            kept = torch.ones(100 * (comm.rank + 1))
            comm.barrier()
            return len(kept) and comm.memory.use.current_bytes

        assert run(3, program).results == [400, 800, 1200]

    def test_gathered_buffers_are_communication(self):
        def program(comm):
            whole = comm.all_gather(torch.ones(100))
            return comm.memory.use.current["communication_buffers"], whole.nbytes

        assert run(4, program).results == [(1600, 1600)] * 4

    def test_a_tensor_resized_behind_our_back(self):
        """FSDP frees and refills storages by resize_."""

        def program(comm):
            x = torch.ones(1000)
            comm.memory.label(x, "parameters")
            x.untyped_storage().resize_(0)
            freed = comm.memory.use.current["parameters"]
            x.untyped_storage().resize_(4000)
            return freed, comm.memory.use.current["parameters"]

        assert run(1, program).results == [(0, 4000)]

    def test_offload_moves_bytes_to_the_host_and_takes_time(self):
        def program(comm):
            x = torch.ones(250_000)
            away = to_host(comm, x)
            del x
            use = comm.memory.use
            back = to_device(comm, away)
            return use.current["host"], use.current_bytes, back.sum().item(), comm.now_seconds

        host, device, total, seconds = run(1, program, hardware=CLASSROOM).results[0]
        assert (host, device, total) == (1_000_000, 0, 250_000)
        link = CLASSROOM.host
        assert seconds == pytest.approx(2 * (link.latency_seconds + 1e6 / link.bytes_per_second))

    def test_is_measured_false_counts_no_memory_but_all_traffic(self):
        done = run(2, lambda c: c.all_reduce(torch.ones(100)), is_measured=False)
        assert done.trace.memory()[0].peak_bytes == 0
        assert done.trace.total(rank=0).wire_bytes == 400

    def test_rejects_an_unknown_category(self):
        with pytest.raises(ValueError, match="category: expected one of parameters"):
            run(1, lambda c: c.memory.label(torch.ones(1), "weights"))


class TestTrace:
    def test_perfetto_file_has_every_bar(self, tmp_path):
        def program(comm):
            with comm.region("forward"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            comm.all_reduce(torch.ones(4))

        trace = run(2, program, hardware=CLASSROOM).trace
        trace.to_perfetto(tmp_path / "trace.json")
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        bars = [event for event in events if event["ph"] == "X"]
        assert len(bars) == len(trace.timeline()) == 4
        assert {bar["name"] for bar in bars} == {"forward", "all_reduce"}
        for bar, event in zip(bars[:2], trace.timeline(rank=0), strict=True):
            assert bar["dur"] == pytest.approx((event.end_seconds - event.start_seconds) * 1e6)
            assert bar["pid"] == 0
        assert any(event["ph"] == "C" for event in events)

    def test_neighbouring_work_of_one_name_is_one_bar(self):
        def program(comm):
            for _ in range(5):
                torch.ones(4, 4) @ torch.ones(4, 4)

        assert len(run(1, program, hardware=CLASSROOM).trace.timeline()) == 1

    def test_memory_samples_reach_the_peak(self):
        def program(comm):
            x = torch.ones(100)
            comm.compute(1e9)
            y = torch.ones(200)
            return len(x) + len(y)

        trace = run(1, program, hardware=CLASSROOM).trace
        samples = trace.memory_samples(0)
        assert [sum(s.by_category.values()) for s in samples] == [400, 1200]
        assert samples[-1].seconds == pytest.approx(1e-3)
        assert trace.memory()[0].peak_bytes == 1200
