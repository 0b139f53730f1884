"""Runs whose step time is published, as plans: what the planner is held against.

Of each run: model, plan, batch, cluster, and the seconds of a step that the source's figure means.
`notes` says what the source does not print and we assumed. `is_calibration` marks the runs on
which the efficiencies of cluster.py were chosen: MPT 1B and 7B. Nothing is fitted on any other.

Sources: Narayanan et al., 2104.04473, tables 1 and 2; Korthikanti et al., 2205.05198, table 5 and
abstract; Llama 3, 2407.21783, table 4; MPT: see published_mpt.py.
"""

from dataclasses import dataclass, replace
from functools import cache

from reference.parallel.planner.cluster import Cluster, a100_cluster, h100_cluster
from reference.parallel.planner.plans import Batch, Plan, Recompute
from reference.parallel.planner.published_mpt import A100_80GB, H100_80GB, SIZES, VOCAB_SIZE
from reference.parallel.planner.seconds import model_flops
from reference.parallel.planner.shapes import ModelShape, gpt_shape, llama_shape
from reference.transformer import PRESETS

CALIBRATION = ("1b", "7b")

# Billions of parameters: heads, width, layers, tensor, pipeline, GPUs, batch, TFLOP/s a GPU.
NARAYANAN_1 = {
    1.7: (24, 2304, 24, 1, 1, 32, 512, 137),
    3.6: (32, 3072, 30, 2, 1, 64, 512, 138),
    7.5: (32, 4096, 36, 4, 1, 128, 512, 142),
    18.4: (48, 6144, 40, 8, 1, 256, 1024, 135),
    39.1: (64, 8192, 48, 8, 2, 512, 1536, 138),
    76.1: (80, 10240, 60, 8, 4, 1024, 1792, 140),
    145.6: (96, 12288, 80, 8, 8, 1536, 2304, 148),
    310.1: (128, 16384, 96, 8, 16, 1920, 2160, 155),
    529.6: (128, 20480, 105, 8, 35, 2520, 2520, 163),
    1008.0: (160, 25600, 128, 8, 64, 3072, 3072, 163),
}
GPT_175B, GPT_530B, GPT_1T, GPT_22B = (
    (12288, 96, 96), (20480, 105, 128), (25600, 128, 160), (6144, 48, 64),
)  # fmt: skip
# Model, pipeline, then GPUs, batch, micro-batch, TFLOP/s a GPU.
NARAYANAN_2 = {
    "PTD-P": [
        (GPT_175B, 12, 384, 1536, 1, 153), (GPT_175B, 12, 768, 1536, 1, 149),
        (GPT_175B, 12, 1536, 1536, 1, 141), (GPT_530B, 35, 560, 2240, 1, 171),
        (GPT_530B, 35, 1120, 2240, 1, 167), (GPT_530B, 35, 2240, 2240, 1, 159),
    ],
    "ZeRO-3": [
        (GPT_175B, 1, 384, 1536, 4, 144), (GPT_175B, 1, 768, 1536, 2, 88),
        (GPT_175B, 1, 1536, 1536, 1, 44), (GPT_530B, 1, 640, 2560, 4, 138),
        (GPT_530B, 1, 1120, 2240, 2, 98), (GPT_530B, 1, 2240, 2240, 1, 48),
    ],
}  # fmt: skip
# Model, pipeline, chunks, GPUs, batch, micro-batch; seconds with full recomputation, and with
# selective recomputation and sequence parallelism.
KORTHIKANTI_5 = [
    (GPT_22B, 1, 1, 8, 4, 4, 1.42, 1.10),
    (GPT_175B, 8, 3, 64, 64, 1, 18.13, 13.75),
    (GPT_530B, 35, 3, 280, 280, 1, 49.05, 37.83),
    (GPT_1T, 64, 1, 512, 512, 1, 94.42, 71.49),
]
KORTHIKANTI_2240_MFU = (0.421, 0.542)
# Context, data, GPUs, positions, sequences a data rank, TFLOP/s a GPU.
LLAMA_3 = [(1, 64, 8192, 8192, 32, 430), (1, 128, 16384, 8192, 16, 400),
           (16, 8, 16384, 131072, 16, 380)]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run. `seconds`: of one step."""

    source: str
    name: str
    model: ModelShape
    plan: Plan
    batch: Batch
    cluster: Cluster
    seconds: float
    notes: str = ""
    is_calibration: bool = False


@cache
def published_runs() -> tuple[Run, ...]:
    """All of them, by source."""
    return (*_narayanan_1(), *_narayanan_2(), *_korthikanti(), *_llama_3(), *_mpt())


def narayanan_flops(model: ModelShape, batch: Batch) -> float:
    """Of a step with full recomputation, as the paper counts: eq. 3, 96 B s l h^2 (1 + ...)."""
    h, s = model.dim, batch.seq_len
    ends = 1 + s / (6 * h) + model.vocab_size / (16 * model.num_layers * h)
    return 96 * batch.num_tokens * model.num_layers * h * h * ends


MEGATRON = Plan(attention="eager", is_overlapped=False, recompute="full")  # of 2021


def _of_tflops(source: str, name: str, model: ModelShape, plan: Plan, batch: Batch, *,
               tflops: float, notes: str) -> Run:  # fmt: skip
    cluster = a100_cluster(plan.num_gpus)
    seconds = narayanan_flops(model, batch) / (plan.num_gpus * tflops * 1e12)
    return Run(source=source, name=name, model=model, plan=plan, batch=batch, cluster=cluster,
               seconds=seconds, notes=notes)  # fmt: skip


def _narayanan_1() -> list[Run]:
    runs = []
    for billions, (heads, dim, layers, t, p, gpus, sequences, tflops) in NARAYANAN_1.items():
        data = gpus // (t * p)
        plan = replace(MEGATRON, data=data, tensor=t, pipeline=p, micro_batch=_whole_micro_batch(p))
        runs.append(_of_tflops(
            "Narayanan, table 1", f"GPT {billions}B", gpt_shape(dim, layers, heads), plan,
            Batch(sequences, 2048), tflops=tflops,
            notes="micro-batch not printed: 1 in a pipeline, 4 without; not interleaved",
        ))  # fmt: skip
    return runs


def _whole_micro_batch(pipeline: int) -> int:
    return 4 if pipeline == 1 else 1


def _narayanan_2() -> list[Run]:
    runs = []
    for way, rows in NARAYANAN_2.items():
        for shape, p, gpus, sequences, micro, tflops in rows:
            model, name = gpt_shape(*shape), f"GPT {gpt_shape(*shape).num_parameters / 1e9:.0f}B"
            if way == "PTD-P":
                plan = replace(
                    MEGATRON, data=gpus // (8 * p), tensor=8, pipeline=p, micro_batch=micro
                )
            else:
                plan = replace(
                    MEGATRON, data=gpus, zero_stage=3, micro_batch=micro, is_overlapped=True
                )
            runs.append(_of_tflops(
                f"Narayanan, table 2, {way}", f"{name} on {gpus}", model, plan,
                Batch(sequences, 2048), tflops=tflops,
                notes="not interleaved" if way == "PTD-P" else "a gather for each layer",
            ))  # fmt: skip
    return runs


def _korthikanti() -> list[Run]:
    runs = []
    for shape, p, v, gpus, sequences, micro, full, selective in KORTHIKANTI_5:
        runs += _both_ways(shape, p, v, gpus, sequences, micro, (full, selective), "table 5")
    model, batch, peak = gpt_shape(*GPT_530B), Batch(2240, 2048), 2240 * 312e12
    times = tuple(model_flops(model, batch) / peak / mfu for mfu in KORTHIKANTI_2240_MFU)
    return runs + _both_ways(GPT_530B, 35, 3, 2240, 2240, 1, times, "abstract")


def _both_ways(shape: tuple[int, int, int], p: int, v: int, gpus: int, sequences: int, micro: int,
               times: tuple[float, ...], where: str) -> list[Run]:  # fmt: skip
    model, batch = gpt_shape(*shape), Batch(sequences, 2048)
    runs = []
    kinds: tuple[Recompute, Recompute] = ("full", "selective")
    for recompute, seconds in zip(kinds, times, strict=True):
        plan = replace(MEGATRON, 
            data=gpus // (8 * p), tensor=8, pipeline=p, micro_batch=micro, recompute=recompute,
            schedule="interleaved" if v > 1 else "1F1B", num_chunks=v,
            sequence_parallel=recompute == "selective",
        )  # fmt: skip
        runs.append(Run(
            source=f"Korthikanti, {where}",
            name=f"GPT {model.num_parameters / 1e9:.0f}B on {gpus}, {recompute}",
            model=model, plan=plan, batch=batch, cluster=a100_cluster(gpus), seconds=seconds,
        ))  # fmt: skip
    return runs


def _llama_3() -> list[Run]:
    model = llama_shape(PRESETS["llama-3.1-405b"])
    runs = []
    for context, data, gpus, positions, rows, tflops in LLAMA_3:
        batch = Batch(rows * data, positions)
        plan = Plan(
            data=data, tensor=8, pipeline=16, context=context, zero_stage=1, gradient_bytes=4,
            sequence_parallel=True, schedule="interleaved", num_chunks=7,
        )  # fmt: skip
        seconds = model_flops(model, batch, is_causal=True) / (gpus * tflops * 1e12)
        runs.append(Run(
            source="Llama 3, table 4", name=f"405B on {gpus}, {positions}", model=model, plan=plan,
            batch=batch, cluster=h100_cluster(gpus), seconds=seconds,
            notes="chunks (7), count of FLOPs (causal) and when gradients travel not printed",
        ))  # fmt: skip
    return runs


def _mpt() -> list[Run]:
    tables = (("MPT, A100", A100_80GB, a100_cluster), ("MPT, H100", H100_80GB, h100_cluster))
    runs = []
    for source, table, cluster in tables:
        for line in table.split("\n"):
            if not line:
                continue
            size, *numbers, kind, rate = line.split()
            positions, gpus, micro, steps = map(int, numbers)
            dim, layers, heads = SIZES[size]
            model = gpt_shape(dim, layers, heads, vocab_size=VOCAB_SIZE, context=positions,
                              has_dropout=False)  # fmt: skip
            plan = Plan(data=gpus, zero_stage=3, micro_batch=micro, gradient_bytes=4,
                        recompute="full" if kind == "f" else "none")  # fmt: skip
            batch = Batch(micro * steps * gpus, positions)
            runs.append(Run(
                source=source, name=f"{size}, {positions} positions, {gpus} GPUs", model=model,
                plan=plan, batch=batch, cluster=cluster(gpus),
                seconds=batch.num_tokens / (float(rate) * gpus),
                is_calibration=size in CALIBRATION,
            ))  # fmt: skip
    return runs
