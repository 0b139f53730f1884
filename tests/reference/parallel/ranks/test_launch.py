"""The same program on processes, under torchrun, and one rank out of thousands."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from reference.parallel.ranks import CLASSROOM, run, run_one_rank
from reference.transformer import Llama, LlamaConfig, next_token_loss
from tests.tolerances import TOLERANCE

CONFIG = LlamaConfig(
    vocab_size=29, dim=16, hidden_dim=24, num_layers=2, num_heads=2, max_seq_len=12
)


def train(comm, num_steps=3):
    """A data parallel Llama by hand: the program of all backends."""
    torch.manual_seed(0)
    model = Llama(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(num_steps):
        rows = torch.Generator().manual_seed(step)
        batch = torch.randint(0, 29, (8, 10), generator=rows).chunk(comm.size)[comm.rank]
        optimizer.zero_grad()
        next_token_loss(model(batch), batch).backward()
        for p in model.parameters():
            comm.all_reduce(p.grad, "mean")
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


class TestProcesses:
    def test_trained_weights_are_bitwise_equal_on_two_ranks(self):
        simulated = run(2, train).results
        processes = run(2, train, backend="processes").results
        for rank in range(2):
            for ours, theirs in zip(simulated[rank], processes[rank], strict=True):
                assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("world_size", [4, 8])
    def test_trained_weights_agree_within_rounding_beyond(self, world_size):
        simulated = run(world_size, train, 1).results[0]
        processes = run(world_size, train, 1, backend="processes").results[0]
        for ours, theirs in zip(simulated, processes, strict=True):
            assert_close(ours, theirs, **TOLERANCE[torch.float32])

    def test_ledgers_are_the_same(self):
        simulated = run(2, train, hardware=CLASSROOM).trace
        processes = run(2, train, hardware=CLASSROOM, backend="processes").trace
        assert simulated.traffic() == processes.traffic()
        assert simulated.traffic_matrix() == processes.traffic_matrix()
        assert simulated.seconds == pytest.approx(processes.seconds)
        for rank in range(2):
            ours, theirs = simulated.memory()[rank], processes.memory()[rank]
            for category in ("parameters", "gradients", "optimizer_states"):
                assert ours.peak[category] == theirs.peak[category]

    def test_groups_and_meshes(self):
        def program(comm):
            mesh = comm.mesh(dp=2, tp=2)
            x = torch.tensor(float(comm.rank))
            first = mesh.tp.all_reduce(x.clone()).item()
            second = comm.split(comm.rank % 2).all_reduce(x.clone()).item()
            return first, second

        assert run(4, program).results == run(4, program, backend="processes").results

    def test_random_streams_are_the_same(self):
        def program(comm):
            return torch.rand(3)

        for one, other in zip(
            run(2, program, seed=4).results,
            run(2, program, seed=4, backend="processes").results,
            strict=True,
        ):
            assert torch.equal(one, other)

    def test_an_error_comes_with_its_rank(self):
        def program(comm):
            if comm.rank == 1:
                raise LookupError("no such shard")
            comm.barrier()

        with pytest.raises(LookupError, match="no such shard") as caught:
            run(2, program, backend="processes")
        assert "raised in rank 1 of 2" in "".join(caught.value.__notes__)

    def test_a_process_that_dies_is_named(self):
        def program(comm):
            if comm.rank == 1:
                os._exit(1)
            comm.barrier()

        with pytest.raises(RuntimeError, match="rank 1 has died|Connection closed|peer"):
            run(2, program, backend="processes")

    def test_rejects_results_that_cannot_travel(self):
        with pytest.raises(TypeError, match="cannot be sent from its process"):
            run(1, lambda comm: lambda: None, backend="processes")

    def test_rejects_shapes_only(self):
        with pytest.raises(ValueError, match="shapes_only"):
            run(2, train, backend="processes", shapes_only=True)


def test_same_program_under_torchrun(tmp_path):
    """Two processes that torchrun starts write what simulated ranks compute."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch
            from reference.parallel.ranks import CollectiveMismatch, comm_from_environment

            def program(comm):
                torch.set_num_threads(1)
                x = torch.rand(5)
                comm.all_reduce(x, "mean")
                try:
                    comm.all_gather(torch.ones(1 + comm.rank))
                except CollectiveMismatch as error:
                    caught = str(error).split(" at ")[0]
                return x, comm.traffic.total().wire_bytes, caught

            if __name__ == "__main__":
                with comm_from_environment(seed=3) as comm:
                    torch.save(program(comm), f"{sys.argv[1]}/{comm.rank}.pt")
            """
        )
    )
    root = Path(__file__).parents[4]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(tmp_path)],
        check=True, cwd=root, capture_output=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    namespace = {"__name__": "train"}
    exec(script.read_text(), namespace)
    simulated = run(2, namespace["program"], seed=3).results
    for rank in range(2):
        values, *rest = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(values, simulated[rank][0]) and rest == list(simulated[rank][1:])


class TestShapesOnly:
    def test_ledgers_are_those_of_a_run_with_values(self):
        real = run(4, train, hardware=CLASSROOM).trace
        shapes = run(4, train, hardware=CLASSROOM, shapes_only=True).trace
        one = run_one_rank(4, train, rank=2, hardware=CLASSROOM).trace
        assert shapes.seconds == pytest.approx(real.seconds)
        assert one.seconds == pytest.approx(real.seconds)
        assert one.total(rank=2).wire_bytes == real.total(rank=2).wire_bytes
        for trace in (shapes, one):
            for category in ("parameters", "gradients", "optimizer_states"):
                ours, theirs = (t.memory()[2].peak[category] for t in (trace, real))
                assert ours == theirs, category

    @pytest.mark.parametrize("world_size", [64, 1024, 16384])
    def test_one_rank_out_of_thousands(self, world_size):
        def program(comm):
            mesh = comm.mesh(dp=-1, tp=8)
            layer = nn.Linear(4096, 4096, bias=False)
            layer(torch.ones(16, 4096)).sum().backward()
            mesh.dp.all_reduce(layer.weight.grad, "mean")
            shard = mesh.dp.reduce_scatter(torch.empty(4096, 4096))
            return mesh.dp.size, tuple(shard.shape)

        done = run_one_rank(world_size, program, rank=world_size - 1)
        n, size = world_size // 8, 4 * 4096**2
        assert done.results == [(n, (4096 // n, 4096))]
        rank = world_size - 1
        assert done.trace.total(rank=rank).wire_bytes == pytest.approx(3 * (n - 1) / n * size)
        assert done.trace.memory()[rank].peak["parameters"] == size

    def test_a_model_that_fits_no_machine_here(self):
        """70 billion parameters by shapes alone."""

        def program(comm):
            return nn.Linear(70_000, 1_000_000, bias=False).weight.numel()

        done = run_one_rank(8, program)
        assert done.results == [70_000 * 1_000_000]

    def test_matches_torchs_fake_process_group(self):
        """torch's own shape-only collectives give the same shapes."""
        code = """
            import torch, torch.distributed as dist
            from torch._subclasses.fake_tensor import FakeTensorMode
            from torch.testing._internal.distributed.fake_pg import FakeStore
            dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4096)
            with FakeTensorMode():
                whole = torch.empty(4096 * 2, 3)
                dist.all_gather_single(whole, torch.ones(2, 3))
                part = torch.empty(5, 2)
                dist.reduce_scatter_single(part, torch.ones(4096 * 5, 2))
                print(tuple(whole.shape), tuple(part.shape))
        """

        def program(comm):
            whole = comm.all_gather(torch.ones(2, 3))
            part = comm.reduce_scatter(torch.ones(comm.size * 5, 2))
            return tuple(whole.shape), tuple(part.shape)

        done = run_one_rank(4096, program, rank=3)
        fake = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert fake.stdout.split("\n")[0] == " ".join(map(str, done.results[0]))

    def test_rejects_split_and_ranks_outside(self):
        with pytest.raises(RuntimeError, match="use comm.mesh"):
            run_one_rank(4, lambda comm: comm.split(0))
        with pytest.raises(ValueError, match="rank: expected 0 to 3, got 4"):
            run_one_rank(4, lambda comm: None, rank=4)


def test_trace_is_plain_data():
    """For figures and files: everything can be written as JSON."""
    trace = run(2, train, 1).trace
    json.dumps([event._asdict() for event in trace.timeline()])
    json.dumps(trace.traffic_matrix())
    json.dumps([sample._asdict() for sample in trace.memory_samples(0)])
