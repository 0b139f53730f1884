"""Keys and values of earlier tokens, kept: five caches, generation with them, and serving.

dynamic      grows with the text
static       room for the longest text from the start
rolling      the last W tokens in a ring
quantized    one byte an element
blocks       who owns which block: free list, reference counts, copy-on-write, shared prefixes
paged        pools of blocks, and a batch's view of them
branching    parallel samples and beams that share a prompt's blocks
generation   prefill and decode, prompts of different lengths
request      a request, one under way, a step
scheduler    continuous batching: admission, preemption, recomputation
engine       its steps on a model, and static batching
simulation   waste and sharing on traces        cost   seconds of an iteration by the roofline

Any cache has `update(k, v, layer)` and `get_seq_length()`, as transformers' DynamicCache.
"""

from reference.kv_cache.blocks import BlockManager, OutOfBlocks
from reference.kv_cache.branching import beam_search, sample_parallel
from reference.kv_cache.cost import (
    Machine,
    ServedModel,
    iteration_bytes,
    iteration_flops,
    iteration_intensity,
    iteration_seconds,
)
from reference.kv_cache.dynamic import DynamicCache
from reference.kv_cache.engine import compute_step, serve, serve_static
from reference.kv_cache.generation import column_mask, generate, left_pad
from reference.kv_cache.paged import FlatBatch, PagedBatch, PagedCache
from reference.kv_cache.quantized import Int8Cache, dequantize, quantize_rows
from reference.kv_cache.request import Iteration, Request, Running, Step
from reference.kv_cache.rolling import RollingCache, slot_columns
from reference.kv_cache.scheduler import Scheduler, run
from reference.kv_cache.simulation import (
    beam_saved,
    sampling_saved,
    static_iterations,
    utilization,
)
from reference.kv_cache.static import StaticCache

__all__ = [
    "BlockManager",
    "DynamicCache",
    "FlatBatch",
    "Int8Cache",
    "Iteration",
    "Machine",
    "OutOfBlocks",
    "PagedBatch",
    "PagedCache",
    "Request",
    "RollingCache",
    "Running",
    "Scheduler",
    "ServedModel",
    "StaticCache",
    "Step",
    "beam_saved",
    "beam_search",
    "column_mask",
    "compute_step",
    "dequantize",
    "generate",
    "iteration_bytes",
    "iteration_flops",
    "iteration_intensity",
    "iteration_seconds",
    "left_pad",
    "quantize_rows",
    "run",
    "sample_parallel",
    "sampling_saved",
    "serve",
    "serve_static",
    "slot_columns",
    "static_iterations",
    "utilization",
]
