"""PyTorch, and the experts of transformers on it. Usage: peer_torch.py THREADS, then commands (see peer.py)."""

import sys

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from peer import Variant, serve
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

torch.set_num_threads(int(sys.argv[1]))
torch.set_grad_enabled(False)


def tensor(array):
    array = np.array(array, order="C")
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == np.uint16 else torch.from_numpy(array)


def answer(out):
    return {"out": out.float().numpy()}


def mixtures(arrays, is_decode):
    """Router and experts as transformers' block has them; the implementations share the weights."""
    shared = {}

    def block():
        if not shared:
            experts, inner, hidden = arrays.shape("gate")
            config = Qwen3MoeConfig(
                hidden_size=hidden,
                moe_intermediate_size=inner,
                num_experts=experts,
                num_experts_per_tok=arrays.shape("ids")[-1],
                norm_topk_prob=True,
                hidden_act="silu",
            )
            config._experts_implementation = "eager"
            with torch.device("meta"):
                made = Qwen3MoeSparseMoeBlock(config)
            gate_up = np.concatenate([arrays["gate"], arrays["up"]], axis=1)
            weights = {
                "gate.weight": arrays["router"],
                "experts.gate_up_proj": gate_up,
                "experts.down_proj": arrays["down"],
            }
            made.load_state_dict({name: tensor(array) for name, array in weights.items()}, assign=True)
            shared["block"], shared["x"] = made.eval(), tensor(arrays["x"])
        return shared["block"], shared["x"]

    def variant(implementation):
        made, x = block()

        def call(number):
            made.experts.config._experts_implementation = implementation
            return made(x[number : number + 1])

        return Variant(call, answer, inputs=len(x))

    # batched_mm copies the matrices of every token's experts: 77 GB for 512 tokens.
    names = ["eager", "grouped_mm"] + (["batched_mm"] if is_decode else [])
    return {f"transformers {name}": lambda name=name: variant(name) for name in names}


def attentions(arrays):
    copies, keys, kv_heads, width = arrays.shape("k")
    queries, heads, _ = arrays.shape("q")

    def made():
        # [1, heads, rows, width]
        q = tensor(arrays["q"]).transpose(0, 1).contiguous()[None]
        k, v = (tensor(arrays[name]).transpose(1, 2).contiguous() for name in "kv")
        return q, k, v

    def plain():
        q, k, v = made()
        causal = queries > 1

        def call(i):
            return F.scaled_dot_product_attention(q, k[i : i + 1], v[i : i + 1], is_causal=causal, enable_gqa=True)

        return Variant(call, lambda out: answer(out[0].transpose(0, 1)), inputs=copies)

    def grouped():
        q, k, v = made()
        q = q.view(1, kv_heads, heads // kv_heads, width)  # one query only: its heads are rows that see the same keys

        def call(i):
            return F.scaled_dot_product_attention(q, k[i : i + 1], v[i : i + 1])

        return Variant(call, answer, inputs=copies)

    found = {"torch sdpa": plain}
    if queries == 1:
        found["torch sdpa, heads as rows"] = grouped
    return found


def linears(arrays):
    def plain():
        x, weight = tensor(arrays["x"]), tensor(arrays["weight"])
        return Variant(lambda _: F.linear(x, weight), answer)

    def packed():
        x = tensor(arrays["x"])
        weight = torch.ops.mkldnn._reorder_linear_weight(tensor(arrays["weight"]), len(x))
        return Variant(lambda _: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""), answer)

    return {"torch F.linear": plain, "torch oneDNN, packed": packed}


def routes(arrays):
    def made():
        logits, top_k = tensor(arrays["logits"]), arrays.shape("ids")[-1]

        def call(_):
            weights, ids = torch.topk(F.softmax(logits, dim=-1), top_k, dim=-1)
            weights /= weights.sum(dim=-1, keepdim=True)
            return ids, weights, torch.bincount(ids.view(-1), minlength=logits.shape[1])

        return Variant(call, lambda out: {"ids": out[0].numpy(), "out": out[1].numpy()})

    return {"torch softmax, topk, bincount": made}


def make(workload, dtype, arrays):
    if dtype == "f16":
        return {}  # without AVX-512 FP16 its matrix products take 100 times as long as in f32
    match workload.split(".")[0]:
        case "W1" | "W2" | "W3":
            return mixtures(arrays, is_decode=workload.startswith("W2"))
        case "W4" | "W5":
            return attentions(arrays)
        case "W6":
            return linears(arrays)
        case _:
            return routes(arrays)


serve(make, {"torch": torch.__version__, "transformers": transformers.__version__})
