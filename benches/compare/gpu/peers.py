"""What people use today on a GPU, on gatefold's inputs: PyTorch (with cuBLAS behind it) and a fused mixture in Triton.

`make(kind, arrays)` gives {name: function that makes a call}; a call takes no argument and returns {array name: tensor}. Inputs are put
where the library likes them best before the clock starts: weights as they are stored, prefix sums and orders where a model would keep
them. What a model computes per call (scores, top-k, sorting) is inside.
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # told in the report, not hidden
    triton = None

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i32": torch.int32}


def tensor(arrays, name):
    """An array on the GPU; bf16 arrives as its bits."""
    import numpy as np

    data, dtype = np.ascontiguousarray(arrays[name]), arrays.table[name]["dtype"]
    if dtype == "bf16":
        return torch.from_numpy(data.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(data).cuda()


# ------------------------------------------------------------------------------ products


def linear(arrays):
    x, weight = tensor(arrays, "x"), tensor(arrays, "weight")

    def matmul():
        return lambda: {"out": F.linear(x, weight)}

    return {"torch F.linear (cuBLAS)": matmul}


# ------------------------------------------------------------------------------ attention


def prefill(arrays):
    q, k, v = (tensor(arrays, name).transpose(0, 1).unsqueeze(0) for name in ("q", "k", "v"))  # [1, heads, tokens, width]
    causal = bool(arrays.table["q"].get("causal"))

    def sdpa(backend):
        def start():
            from torch.nn.attention import SDPBackend, sdpa_kernel

            def call():
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
                return {"out": out[0].transpose(0, 1)}

            call()
            return call

        return start

    return {"torch SDPA flash": sdpa("FLASH_ATTENTION"), "torch SDPA cuDNN": sdpa("CUDNN_ATTENTION")}


def decode(arrays):
    q, k, v = (tensor(arrays, name) for name in ("q", "k", "v"))  # q [batch, heads, width]; k, v [batch, rows, kv heads, width]
    batch, heads, width = q.shape
    rows, kv_heads = k.shape[1], k.shape[2]

    def folded():
        # Query heads of a group as rows: keys are read once.
        query = q.view(batch, kv_heads, heads // kv_heads, width)
        key, value = k.transpose(1, 2), v.transpose(1, 2)
        return lambda: {"out": F.scaled_dot_product_attention(query, key, value).reshape(batch, heads, width)}

    def grouped():
        query, key, value = q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2)
        return lambda: {"out": F.scaled_dot_product_attention(query, key, value, enable_gqa=True).squeeze(2)}

    return {"torch SDPA, group as rows": folded, "torch SDPA, enable_gqa": grouped}


# ------------------------------------------------------------------------------ mixtures


def choose(x, router, top_k):
    logits = F.linear(x.float(), router.float())
    weights, ids = torch.topk(torch.softmax(logits, -1), top_k)
    return weights / weights.sum(-1, keepdim=True), ids


def grouped_mm(x, gate_up, down, weights, ids):
    """Sorted rows, `torch._grouped_mm` twice, weighted sum."""
    tokens, top_k = ids.shape
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    offsets = torch.bincount(flat, minlength=gate_up.shape[0]).cumsum(0).to(torch.int32)
    rows = x[order // top_k]
    gate, up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets).chunk(2, -1)
    y = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offsets)
    back = torch.empty_like(y)
    back[order] = y
    return (back.view(tokens, top_k, -1).float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)


if triton:

    @triton.jit
    def _expert_rows(a, w, out, row_of, tile_expert, tile_row, tile_rows, n_cols, k_size, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        """out[r] = a[row_of[r]] w[expert]^T for one tile of sorted rows."""
        tile, column = tl.program_id(0), tl.program_id(1) * BN
        count = tl.load(tile_rows + tile)
        if count == 0:
            return
        expert, first = tl.load(tile_expert + tile).to(tl.int64), tl.load(tile_row + tile)
        lane = tl.arange(0, BM)
        inside = lane < count
        source = tl.load(row_of + first + lane, inside, 0).to(tl.int64)
        cols, ks = column + tl.arange(0, BN), tl.arange(0, BK)
        a_at = a + source[:, None] * k_size + ks[None, :]
        w_at = w + expert * n_cols * k_size + cols[None, :] * k_size + ks[:, None]
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, k_size, BK):
            left = ks < k_size - k
            acc += tl.dot(tl.load(a_at + k, inside[:, None] & left[None, :], 0.0), tl.load(w_at + k, (cols[None, :] < n_cols) & left[:, None], 0.0))
        at = out + (first + lane).to(tl.int64)[:, None] * n_cols + cols[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), inside[:, None] & (cols[None, :] < n_cols))

    def triton_rows(a, w, row_of, tiles, out):
        block_m = tiles["block"]
        grid = (tiles["count"], triton.cdiv(w.shape[1], 128))
        warps = 8 if block_m >= 64 else 4
        _expert_rows[grid](a, w, out, row_of, tiles["expert"], tiles["row"], tiles["rows"], w.shape[1], w.shape[2], block_m, 128, 64, num_warps=warps, num_stages=3)
        return out

    def triton_tiles(counts, assignments, experts, block):
        """Tiles of sorted rows on the device; as many as there can be, without a look from the host."""
        most = min(assignments, experts) + assignments // block
        per = (counts + block - 1) // block
        ends, starts = per.cumsum(0), counts.cumsum(0) - counts
        tile = torch.arange(most, device=counts.device)
        expert = torch.searchsorted(ends, tile, right=True).clamp(max=experts - 1)
        within = tile - (ends - per)[expert]
        rows = (counts[expert] - within * block).clamp(0, block)
        rows = torch.where(tile < ends[-1], rows, 0)
        return {"block": block, "count": most, "expert": expert.int(), "row": (starts[expert] + within * block).int(), "rows": rows.int()}

    def triton_moe(x, gate_up, down, weights, ids):
        tokens, top_k = ids.shape
        experts, assignments = gate_up.shape[0], ids.numel()
        flat = ids.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=experts)
        block = 16 if assignments <= 16 * experts else 64 if assignments <= 64 * experts else 128
        tiles = triton_tiles(counts, assignments, experts, block)
        both = triton_rows(x, gate_up, (order // top_k).int(), tiles, x.new_empty(assignments, gate_up.shape[1]))
        gate, up = both.chunk(2, -1)
        own = torch.arange(assignments, device=x.device, dtype=torch.int32)
        y = triton_rows((F.silu(gate) * up).contiguous(), down, own, tiles, x.new_empty(assignments, down.shape[1]))
        back = torch.empty_like(y)
        back[order] = y
        return (back.view(tokens, top_k, -1).float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def mixture(arrays, route):
    """With `route`, ids and weights are computed in the call; otherwise they are given."""
    x, gate_up, down = (tensor(arrays, name) for name in ("x", "gate_up", "down"))
    top_k = arrays.shape("ids")[1]
    if route:
        router = tensor(arrays, "router")
        chosen = lambda: choose(x, router, top_k)
    else:
        given = tensor(arrays, "weights"), tensor(arrays, "ids").long()
        chosen = lambda: given

    def with_method(method):
        def start():
            call = lambda: {"out": method(x, gate_up, down, *chosen())}
            call()
            return call

        return start

    found = {"torch._grouped_mm": with_method(grouped_mm)}
    if triton:
        found["Triton, two grouped products"] = with_method(triton_moe)
    return found


def routing(arrays):
    logits = tensor(arrays, "logits")
    top_k = arrays.shape("ids")[1]

    def start():
        def call():
            weights, ids = torch.topk(torch.softmax(logits, -1), top_k)
            weights = weights / weights.sum(-1, keepdim=True)
            flat = ids.flatten()
            order = torch.argsort(flat, stable=True)
            offsets = torch.bincount(flat, minlength=logits.shape[1]).cumsum(0)
            return {"out": weights, "ids": ids, "order": order, "offsets": offsets}

        return call

    return {"torch softmax, topk, argsort": start}


KINDS = {
    "linear": linear,
    "prefill": prefill,
    "decode": decode,
    "moe": lambda arrays: mixture(arrays, True),
    "experts": lambda arrays: mixture(arrays, False),
    "routing": routing,
    "alone": lambda arrays: {},
}
