"""onnxruntime, one operator at a time, f32. Usage: peer_onnxruntime.py THREADS, then commands (see peer.py).

`MoE` takes the router's logits (softmax, choice, experts, weighted sum are inside), so it has a little less to do than the others.
"""

import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from peer import Variant, serve

THREADS = int(sys.argv[1])
TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}


def session(nodes, inputs, outputs, weights):
    """A graph of these nodes; weights are constants, so that operators may pack them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    options.log_severity_level = 3
    small = {name: array for name, array in weights.items() if array.size < 16}  # shapes depend on some
    large = {name: array for name, array in weights.items() if name not in small}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in large.items()}
    constants = [numpy_helper.from_array(array, name) for name, array in small.items()]
    for name, array in large.items():
        constant = TensorProto(name=name, data_type=TYPES[str(array.dtype)], dims=array.shape)
        constant.data_location = TensorProto.EXTERNAL
        constant.external_data.add(key="location", value=name)
        constants.append(constant)
    options.add_external_initializers(list(values), list(values.values()))
    takes = [helper.make_tensor_value_info(name, TYPES[str(a.dtype)], a.shape) for name, a in inputs.items()]
    gives = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    graph = helper.make_graph(nodes, "workload", takes, gives, initializer=constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return made, values  # the values must live as long


def mixture(arrays):
    gate, up = arrays["gate"], arrays["up"]
    experts, inner, hidden = gate.shape
    gate_up = np.empty((experts, 2 * inner, hidden), np.float32)
    gate_up[:, 0::2], gate_up[:, 1::2] = gate, up
    x = np.array(arrays["x"])
    logits = x @ np.array(arrays["router"]).T
    node = helper.make_node(
        "MoE",
        ["x", "logits", "gate_up", "", "down"],
        ["out"],
        domain="com.microsoft",
        k=arrays.shape("ids")[-1],
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
    )
    weights = {"gate_up": gate_up, "down": np.array(arrays["down"])}
    made, keep = session([node], {"x": x[0], "logits": logits[0]}, {"out": TensorProto.FLOAT}, weights)

    def call(i, keep=keep):
        return made.run(None, {"x": x[i], "logits": logits[i]})

    return Variant(call, lambda out: {"out": out[0]}, inputs=len(x))


def attention(arrays):
    copies, keys, kv_heads, width = arrays.shape("k")
    queries, heads, _ = arrays.shape("q")
    k, v = np.array(arrays["k"]), np.array(arrays["v"])
    # The last rows are the new ones; they are in the cache already and are written there again.
    feeds = {
        "q": np.array(arrays["q"]).reshape(1, queries, heads * width),
        "k": k[0, -queries:].reshape(1, queries, kv_heads * width),
        "v": v[0, -queries:].reshape(1, queries, kv_heads * width),
        "past_k": np.zeros((1, kv_heads, keys, width), np.float32),
        "past_v": np.zeros((1, kv_heads, keys, width), np.float32),
        "last": np.array([keys - 1], np.int32),
        "total": np.array([keys], np.int32),
    }
    node = helper.make_node(
        "GroupQueryAttention",
        list(feeds),
        ["out", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
    )
    outputs = dict.fromkeys(["out", "present_k", "present_v"], TensorProto.FLOAT)
    made, _ = session([node], feeds, outputs, {})
    bindings = []
    for i in range(copies):
        binding = made.io_binding()
        own = dict(feeds)
        own["k"] = np.ascontiguousarray(k[i, -queries:]).reshape(feeds["k"].shape)
        own["v"] = np.ascontiguousarray(v[i, -queries:]).reshape(feeds["v"].shape)
        for name in ("q", "k", "v", "last", "total"):
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(own[name]))
        binding.bind_output("out", "cpu")
        for name, array in (("k", k), ("v", v)):  # past and present share one buffer
            cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array[i].transpose(1, 0, 2))[None])
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        bindings.append(binding)

    def call(i):
        made.run_with_iobinding(bindings[i])
        return bindings[i]

    return Variant(call, lambda binding: {"out": binding.get_outputs()[0].numpy()}, inputs=copies)


def linear(arrays):
    x = np.array(arrays["x"])
    weights = {"weight": np.array(arrays["weight"].T, order="C")}
    node = helper.make_node("MatMul", ["x", "weight"], ["out"])
    made, keep = session([node], {"x": x}, {"out": TensorProto.FLOAT}, weights)
    return Variant(lambda _, keep=keep: made.run(None, {"x": x}), lambda out: {"out": out[0]})


def route(arrays):
    logits = np.array(arrays["logits"])
    nodes = [
        helper.make_node("Softmax", ["logits"], ["scores"], axis=-1),
        helper.make_node("TopK", ["scores", "top_k"], ["best", "ids"], axis=-1),
        helper.make_node("ReduceSum", ["best", "axis"], ["sum"], keepdims=1),
        helper.make_node("Div", ["best", "sum"], ["out"]),
    ]
    weights = {"top_k": np.array([arrays.shape("ids")[-1]]), "axis": np.array([-1])}
    outputs = {"ids": TensorProto.INT64, "out": TensorProto.FLOAT}
    made, keep = session(nodes, {"logits": logits}, outputs, weights)
    return Variant(lambda _, keep=keep: made.run(None, {"logits": logits}), lambda out: {"ids": out[0], "out": out[1]})


def make(workload, dtype, arrays):
    if dtype != "f32":
        return {}  # no bf16 on CPUs; f16 is widened
    match workload.split(".")[0]:
        case "W1" | "W2" | "W3":
            return {"onnxruntime MoE": lambda: mixture(arrays)}
        case "W4" | "W5":
            return {"onnxruntime GroupQueryAttention": lambda: attention(arrays)}
        case "W6":
            return {"onnxruntime MatMul": lambda: linear(arrays)}
        case _:
            return {"onnxruntime Softmax, TopK": lambda: route(arrays)}


serve(make, {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__})
