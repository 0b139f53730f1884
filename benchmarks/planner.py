"""The planner beside what was measured: seconds of a step for every published run, gigabytes of a
rank, and the time that planning takes.

ratio - 1 is the error. Runs marked * chose the efficiencies of the planner's cluster.py; nothing is
fitted on any other. Off by more than 15 %: six runs of ZeRO-3 in 2021, which hid less of their
traffic than we let them; three of Llama 3, whose kernels on H100 were better than those of the runs
that we calibrated on; five of MPT, of which four are wide, recompute, and are faster than planned.
"""

import time

from benchmarks.measure import Row
from reference.parallel.planner import (
    Batch,
    ModelShape,
    Plan,
    Run,
    gpt_shape,
    h100_cluster,
    llama_shape,
    memory_bytes,
    published_runs,
    rank_plans,
    step_seconds,
)
from reference.transformer import PRESETS

TOLERANCE, LIMIT_SECONDS, GIB = 0.15, 10.0, 2**30
ZERO_STAGES = (1, 2, 3)
# ZeRO, 1910.02054, table 1: GB at stages 1, 2, 3 for 7.5B, 128B and 1T parameters.
ZERO_TABLE_1 = {
    1: (120, 120, 120, 2048, 2048, 2048, 16000, 16000, 16000),
    4: (52.5, 41.3, 30, 896, 704, 512, 7000, 5500, 4000),
    16: (35.6, 21.6, 7.5, 608, 368, 128, 4750, 2875, 1000),
    64: (31.4, 16.6, 1.88, 536, 284, 32, 4187, 2218, 250),
    256: (30.4, 15.4, 0.47, 518, 263, 8, 4046, 2054, 62.5),
    1024: (30.1, 15.1, 0.12, 513, 257, 2, 4011, 2013, 15.6),
}
# pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 2 and 4: GiB.
TORCHTITAN = (
    ("8b", Plan(data=8, zero_stage=3, recompute="full"), Batch(8, 32768), 83.9),
    ("8b", Plan(data=4, context=2, zero_stage=3, recompute="full"), Batch(4, 65536), 84.2),
    ("8b", Plan(data=2, context=4, zero_stage=3, recompute="full"), Batch(2, 131072), 84.0),
    ("8b", Plan(context=8, zero_stage=3, recompute="full"), Batch(1, 262144), 84.5),
    ("70b", Plan(data=32, tensor=8, sequence_parallel=True, zero_stage=3, recompute="full",
                 micro_batch=16), Batch(512, 8192), 71.9),
)  # fmt: skip


def rows() -> list[Row]:
    runs = published_runs()
    return [*_summary(runs), *map(_run, runs), *_zero_table(), *_torchtitan(), _planning()]


def _seconds(run: Run) -> float:
    return step_seconds(run.model, run.plan, run.cluster, run.batch).total


def _run(run: Run) -> Row:
    mark = "* " if run.is_calibration else ""
    return Row(f"{mark}{run.source}: {run.name}", _seconds(run), run.seconds, "s")


def _summary(runs: tuple[Run, ...]) -> list[Row]:
    found = []
    for source in dict.fromkeys(run.source for run in runs):
        held_out = [run for run in runs if run.source == source and not run.is_calibration]
        within = sum(abs(_seconds(run) / run.seconds - 1) < TOLERANCE for run in held_out)
        found.append(Row(f"within 15 %, {source}", within, len(held_out), "runs"))
    return found


def _zero_table() -> list[Row]:
    found = []
    for world_size, printed in ZERO_TABLE_1.items():
        cells = [(b, stage) for b in (7.5, 128, 1000) for stage in ZERO_STAGES]
        for (billions, stage), gigabytes in zip(cells, printed, strict=True):
            plan = Plan(data=world_size, zero_stage=stage)
            states = memory_bytes(_model(billions), plan, Batch(world_size, 1)).states
            name = f"ZeRO, table 1: {billions:g}B on {world_size}, stage {stage}"
            found.append(Row(name, states.total / 1e9, gigabytes, "GB"))
    return found


def _model(billions: float) -> ModelShape:
    """A GPT of about so many parameters: 12 L D^2, one token, and the layers adjusted."""
    dim = 1024
    layers = round(billions * 1e9 / (12 * dim**2 + 13 * dim))
    return gpt_shape(dim, layers, 8, vocab_size=1, context=1)


def _torchtitan() -> list[Row]:
    found = []
    for size, plan, batch, gibibytes in TORCHTITAN:
        model = llama_shape(PRESETS[f"llama-3.1-{size}"])
        ours = memory_bytes(model, plan, batch).total / GIB
        found.append(Row(f"torchtitan: {size}, {plan}, {batch.seq_len}", ours, gibibytes, "GiB"))
    return found


def _planning() -> Row:
    start = time.perf_counter()
    model = llama_shape(PRESETS["llama-3.1-405b"])
    rank_plans(model, h100_cluster(16_384), Batch(2048, 8192))
    seconds = time.perf_counter() - start
    return Row("planning 405B on 16,384 GPUs, limit", seconds, LIMIT_SECONDS, "s")
