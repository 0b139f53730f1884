"""Chapter 09: quantisation."""

import torch


def quantize_groups(weight, bits, group_size):
    """Integer codes with a scale and a zero point for each group of neighbours in a row.

    weight: (N, D) floats    group_size: divides D; G = D / group_size
    returns (codes, scale, zero_point): uint8 (N, D), float32 (N, G), uint8 (N, G)

    The codes 0 ... 2^bits - 1 span a group from min(smallest, 0) to max(largest, 0), so that 0 can
    be told exactly: scale = (high - low) / (2^bits - 1), zero_point is the code of 0, rounded to
    the nearest integer, and a number's code is round(x / scale) + zero_point, clamped to the
    codes there are. A group of zeros has scale 1 and zero point 0. Compute in float32;
    torch.round rounds halves to even, which is meant.

    What it stands for is scale * (code - zero_point).

    Source: LLM.int8(), arXiv 2208.07339, sec. 2.1.
    """
    # BEGIN SOLUTION
    largest = 2**bits - 1
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    zero_point = (-low / scale).round()
    codes = ((groups / scale[..., None]).round() + zero_point[..., None]).clamp(0, largest)
    return codes.flatten(1).to(torch.uint8), scale, zero_point.to(torch.uint8)
    # END SOLUTION


def normal_float(bits, offset):
    """The levels of a NormalFloat of `bits` bits: quantiles of the normal distribution.

    returns (2^bits,) float64, ascending from -1 to 1

    Negative side: 2^(bits-1) - 1 levels, at the probabilities that divide 1 - offset ... 0.5 into
    as many even steps (0.5 itself is not one of them). Then 0. Positive side: 2^(bits-1) levels, at
    the probabilities that divide 0.5 ... offset into as many even steps, 0.5 again left out. Each
    level is the quantile of its probability (torch.special.ndtri), and all are divided by the
    largest. bits = 4 and offset = 0.9677083 give NF4.

    Source: QLoRA, arXiv 2305.14314, App. E; bitsandbytes, create_normal_map.
    """
    # BEGIN SOLUTION
    half = 2 ** (bits - 1)
    options = {"dtype": torch.float64}
    positive = torch.special.ndtri(torch.linspace(0.5, offset, half + 1, **options))[1:]
    negative = torch.special.ndtri(torch.linspace(1 - offset, 0.5, half, **options))[:-1]
    levels = torch.cat([negative, torch.zeros(1, **options), positive])
    return levels / levels[-1]
    # END SOLUTION


def quantize_blocks(x, levels, block_size):
    """4-bit storage: the index of the nearest level for each number, two in a byte.

    x: any shape; its numbers, in order of memory, make blocks of block_size (even), which divides
    their count    levels: (16,) ascending, from -1 to 1
    returns (packed, absmax): uint8 (count / 2,) and float32 (count / block_size,)

    A block's absmax is its largest absolute value; a number's code is the index of the level
    nearest to number / absmax. The first of two neighbours takes the high four bits of the byte. In
    a block of zeros every code is that of the level nearest to 0. x may be float16 or bfloat16:
    compute in float32. Do not build a tensor of 16 values for each number.

    Source: QLoRA, arXiv 2305.14314, sec. 2 and 3.
    """
    # BEGIN SOLUTION
    blocks = x.float().reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks / torch.where(absmax == 0, 1.0, absmax)[:, None]
    midpoints = ((levels[:-1] + levels[1:]) / 2).to(scaled.dtype)
    codes = torch.bucketize(scaled.flatten(), midpoints).to(torch.uint8)
    return codes[::2] * 16 + codes[1::2], absmax
    # END SOLUTION


def qlora_bytes(matrices, rank, block_size=64, outer_block_size=256):
    """What fine-tuning by QLoRA holds all the time, in bytes: a dict of integers.

    matrices: [(N, D, count), ...], the linear layers: count of them have a weight of N x D, whose
    size block_size divides. Each is stored by itself: codes of 4 bits; and one scale a block, which
    double quantisation keeps in 8 bits, with one float32 for each outer block of outer_block_size
    scales (the last may be shorter) and one float32 mean a matrix. With outer_block_size None there
    is no double quantisation: the scales are float32, and nothing else is kept.
    Each has an adapter of `rank`, A (rank, D) and B (N, rank), in 16 bits, with gradients in 16
    bits and Adam's two moments in 32 bits each.

    {"codes", "scales", "adapters", "gradients", "optimizer"}; "scales" is all but the codes of the
    stored weights.

    Source: QLoRA, arXiv 2305.14314, sec. 3.
    """
    # BEGIN SOLUTION
    codes = scales = trained = 0
    for rows, columns, count in matrices:
        blocks = rows * columns // block_size
        codes += count * rows * columns // 2
        if outer_block_size is None:
            scales += count * 4 * blocks
        else:
            scales += count * (blocks + 4 * -(-blocks // outer_block_size) + 4)
        trained += count * rank * (rows + columns)
    return {
        "codes": codes,
        "scales": scales,
        "adapters": 2 * trained,
        "gradients": 2 * trained,
        "optimizer": 8 * trained,
    }
    # END SOLUTION


def dequantize_blocks(packed, absmax, levels):
    """Given: the numbers that `quantize_blocks` stored, in a row, float32."""
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten().int()
    return (levels.float()[codes].view(len(absmax), -1) * absmax[:, None]).flatten()


def qlora_backward(grad_y, x, packed, absmax, levels, lora_A, lora_B, scaling):
    """The backward pass of QLoRA's layer, by hand: what autograd must be told for each input.

        y = x W^T + scaling * (x A^T) B^T        W = dequantised, N x D

    grad_y: (S, N)    x: (S, D)    packed, absmax: W's storage, row after row, as `quantize_blocks`
    made it    lora_A: (r, D)    lora_B: (N, r)
    returns (grad_x, grad_packed, grad_absmax, grad_A, grad_B): one entry for each input, None for
    what is frozen. `dequantize_blocks` is given.

    Source: QLoRA, arXiv 2305.14314, sec. 3, eq. 5 and 6; LoRA, arXiv 2106.09685, eq. 3.
    """
    # BEGIN SOLUTION
    weight = dequantize_blocks(packed, absmax, levels).view(len(lora_B), -1).to(x.dtype)
    grad_narrow = scaling * (grad_y @ lora_B)  # (S, r)
    grad_x = grad_y @ weight + grad_narrow @ lora_A
    grad_A = grad_narrow.mT @ x
    grad_B = scaling * (grad_y.mT @ (x @ lora_A.mT))
    return grad_x, None, None, grad_A, grad_B
    # END SOLUTION


def paged_states(budget, events):
    """A paged optimizer's pages over a step: which move, and when. Repair it.

    budget: how many pages' worth of memory the device has
    events, in order: ("touch", page), the optimizer updates a page, which must be on the device;
    ("reserve", n), activations take n pages' worth; ("release", n), they give it back
    returns {"faults": int, "evictions": int, "resident": [page, ...]}

    At first every page is on the host. Touching a page that is on the host is a fault: it is copied
    in. Where there is no room, pages are evicted, one by one, the least recently touched first, and
    only as many as are needed. A release moves nothing: a page comes back when it is touched.
    "resident" lists the pages on the device at the end, the least recently touched first. Room
    always suffices for what the events ask. The program below was meant to do this.

    Source: QLoRA, arXiv 2305.14314, sec. 3, "Paged Optimizers".
    """
    # BEGIN SOLUTION
    resident, reserved, faults, evictions = [], 0, 0, 0
    for kind, number in events:
        if kind == "release":
            reserved -= number
            continue
        if kind == "touch" and number in resident:
            resident.remove(number)
            resident.append(number)
            continue
        needed = 1 if kind == "touch" else number
        while len(resident) + reserved + needed > budget:
            resident.pop(0)
            evictions += 1
        if kind == "touch":
            faults += 1
            resident.append(number)
        else:
            reserved += number
    return {"faults": faults, "evictions": evictions, "resident": resident}
    # STARTER
    # | resident, reserved, faults, evictions = [], 0, 0, 0
    # | for kind, number in events:
    # |     if kind == "release":
    # |         reserved -= number
    # |     elif kind == "reserve":
    # |         evictions += len(resident)
    # |         resident = []
    # |         reserved += number
    # |     elif number not in resident:
    # |         while len(resident) + reserved + 1 > budget:
    # |             resident.pop(0)
    # |             evictions += 1
    # |         faults += 1
    # |         resident.append(number)
    # | return {"faults": faults, "evictions": evictions, "resident": resident}
    # END SOLUTION


def round_groups(weight, bits, group_size):
    """Given: weight rounded to 2^bits - 1 even levels around zero, a scale a group of a row."""
    groups = weight.unflatten(1, (-1, group_size))
    largest = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    return ((groups / scale).round() * scale).flatten(1)


def awq(weight, x, bits, group_size, num_alphas):
    """Activation-aware weight quantisation of one linear layer: (stored, scale).

    weight: (N, D)    x: (S, D), calibration inputs    stored: (N, D)    scale: (D,)

    The layer that is left computes (x / scale) stored^T with stored = Q(weight * scale), where Q is
    `round_groups` (given). scale = m^alpha / sqrt(max(m^alpha) * min(m^alpha)), m the mean absolute
    value of each input channel over x, at least 1e-4. alpha is the one of 0, 1/n, ..., (n - 1)/n,
    n = num_alphas, for which the layer's outputs on x have the smallest mean squared error against
    those of the weight itself; the smaller alpha where two are equal.

    Source: AWQ, arXiv 2306.00978, sec. 3.2, eq. 4 and 5.
    """
    # BEGIN SOLUTION
    magnitude = x.abs().mean(0).clamp(min=1e-4)
    target = x @ weight.mT
    best = None
    for i in range(num_alphas):
        scale = magnitude ** (i / num_alphas)
        scale = scale / (scale.max() * scale.min()).sqrt()
        stored = round_groups(weight * scale, bits, group_size)
        error = ((x / scale) @ stored.mT - target).square().mean().item()
        if best is None or error < best[0]:
            best = error, stored, scale
    return best[1], best[2]
    # END SOLUTION


def tiled_linear(x, packed, absmax, levels, num_rows, tile_rows):
    """x W^T for a W in 4-bit storage, of which never more than a tile is unpacked.

    x: (S, D)    packed, absmax, levels: W (num_rows, D), as `quantize_blocks` stored it, row after
    row: blocks know nothing of rows, so that a row may begin in the middle of one. D is even
    returns (S, num_rows) in the dtype of x

    Work through tile_rows rows of W at a time (the last tile may be shorter). Besides
    the output, no tensor may be larger than eight bytes for each number of the blocks of a tile.

    Source: QLoRA, arXiv 2305.14314, sec. 3: "dequantize", then multiply.
    """
    # BEGIN SOLUTION
    width = x.shape[1]
    block_size = num_rows * width // len(absmax)
    out = x.new_empty(len(x), num_rows)
    for top in range(0, num_rows, tile_rows):
        bottom = min(top + tile_rows, num_rows)
        start, stop = top * width, bottom * width
        codes = packed[start // 2 : stop // 2]
        codes = torch.stack([codes >> 4, codes & 15], -1).flatten().int()
        first, last = start // block_size, -(-stop // block_size)
        scales = absmax[first:last].repeat_interleave(block_size)
        scales = scales[start - first * block_size :][: stop - start]
        tile = (levels.float()[codes] * scales).view(-1, width)
        out[:, top:bottom] = x @ tile.to(x.dtype).mT
    return out
    # END SOLUTION
