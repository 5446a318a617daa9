"""The ONNX graph with its weights in 8 bits, activations quantised as they come (dynamic quantisation).

Matrices and embeddings become int8. Convolutions become uint8: onnxruntime computes those faster, and its older
releases no others.

What it costs in quality is for a held-out store to say (`--store`), so a difference from torch is reported and not
refused. x86 processors without VNNI can saturate in 8-bit products: measure on the machine that it is meant for.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.export import onnx as float_graph
from kdcache.export.finished import Finished
from kdcache.export.measure import compare, latencies
from kdcache.export.session import open_session
from kdcache.export.written import Written

GRAPH = "model_int8.onnx"

PRODUCTS = (
    "MatMulInteger",
    "DynamicQuantizeMatMul",
    "ConvInteger",
    "MatMul",
    "Gemm",
    "Conv",
    "LSTM",
    "DynamicQuantizeLSTM",
)
"""What reads most of a network's weights. Products of activations with each other, as in attention, stay MatMul."""


def plugin(student: Finished, folder: Path) -> Written:
    """Write model_int8.onnx.

    Raises:
        ConfigError, MismatchError, UnsupportedError: As the format onnx, whose graph it is made of.
    """
    written = float_graph.plugin(student, folder)
    float_bytes = _bytes_in(folder)
    large, path = float_graph.is_large(student), folder / GRAPH
    with float_graph.quietly():
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.registry import IntegerOpsRegistry

        tied = folder / "tied.onnx"
        model = onnx.load(str(folder / float_graph.GRAPH))
        shared = _share_embeddings(model)
        # shapes that the exporter wrote down: of a weight that the quantiser turns they would be wrong
        del model.graph.value_info[:]
        _save(model, tied, large=large)
        compare(student, open_session(tied), tolerance=float_graph.TOLERANCE)
        options = {"nodes_to_exclude": shared, "use_external_data_format": large}
        if any(node.op_type == "Conv" for node in model.graph.node):
            quantize_dynamic(tied, path, weight_type=QuantType.QUInt8, op_types_to_quantize=["Conv"], **options)
            path.replace(tied)
        others = [one for one in IntegerOpsRegistry if one != "Conv"]
        quantize_dynamic(tied, path, weight_type=QuantType.QInt8, op_types_to_quantize=others, **options)
        model = onnx.load(str(path))
        _look_up_in_8_bits(model, shared)
        for one in folder.iterdir():
            one.unlink()
        _save(model, path, large=large)
    run = open_session(path)
    note = "Without VNNI (x86) 8-bit products can saturate: measure where it will run."
    made_by = f"{written.made_by}, onnxruntime.quantization"
    times = latencies(written.run, run, student.trial.timed[-1])
    beside = (
        f"Beside the float32 graph: {_bytes_in(folder) / float_bytes:.2f}x the size, and "
        f"{times.after.median_ms / times.before.median_ms:.2f}x the time of a batch of {times.shape[0]}."
    )
    return Written(made_by, run, compare(student, run, tolerance=None), (_told(model), beside, note))


def _bytes_in(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.iterdir())


def _told(model: Any) -> str:
    """Say how much of a quantised graph is in 8 bits, and what does the products."""
    from onnx import TensorProto

    sizes: Counter[bool] = Counter()
    for one in model.graph.initializer:
        sizes[one.data_type in (TensorProto.INT8, TensorProto.UINT8)] += math.prod(one.dims)
    done = Counter(node.op_type for node in model.graph.node)
    products = {name: done[name] for name in PRODUCTS if done[name]}
    share = sizes[True] / max(1, sizes.total())
    return (
        f"In 8 bits: {share:.1%} of the weights. Products: {', '.join(f'{n} {name}' for name, n in products.items())}."
    )


def _share_embeddings(model: Any) -> list[str]:
    """Write transposed weights out, and look embeddings up in them where they are the same; return those look-ups.

    Only a constant is quantised. A tied output layer is the transpose of the embeddings: left so, its product, the
    largest of a small student, would stay in float32 and be slower than before; written out beside them, the file would
    hold both.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    tables = {one.name: numpy_helper.to_array(one) for one in graph.initializer if len(one.dims) == 2}
    # table to its transpose
    turned: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in tables:
            values = np.ascontiguousarray(tables[node.input[0]].T)
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
            turned[node.input[0]] = node.output[0]
    nodes, shared = [], []
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in turned:
            continue
        axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
        if node.op_type == "Gather" and node.input[0] in tables and axis == 0:
            # exporters write out the transpose of a small table themselves
            across = turned.get(node.input[0]) or _transpose_of(tables[node.input[0]], tables)
            if across is not None:
                name = f"{node.output[0]}_across"
                shared.append(name)
                nodes.append(helper.make_node("Gather", [across, node.input[1]], [name], name=name, axis=1))
                # [D, S, T] to [S, T, D]
                nodes.append(helper.make_node("Transpose", [name], [node.output[0]], perm=[1, 2, 0]))
                continue
        nodes.append(node)
    _replace(graph, nodes)
    return shared


def _look_up_in_8_bits(model: Any, shared: list[str]) -> None:
    """Let embeddings be looked up in what the output layer's weights have become, instead of in a copy in float32.

    The quantiser's own look-up would turn the table they share to uint8, whose products take twice the time of int8.
    """
    from onnx import helper

    graph = model.graph
    names = {one.name for one in graph.initializer}
    nodes = []
    for node in graph.node:
        table = node.input[0] if node.name in shared else ""
        if f"{table}_quantized" in names:
            found = f"{node.name}_quantized"
            scale = [f"{table}_scale", f"{table}_zero_point"]
            nodes.append(helper.make_node("Gather", [f"{table}_quantized", node.input[1]], [found], axis=1))
            nodes.append(helper.make_node("DequantizeLinear", [found, *scale], [node.output[0]]))
            continue
        nodes.append(node)
    _replace(graph, nodes)


def _replace(graph: Any, nodes: list[Any]) -> None:
    """Put nodes in place of a graph's own, and drop the constants that none of them uses."""
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [one for one in graph.initializer if one.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _transpose_of(table: NDArray[Any], tables: dict[str, NDArray[Any]]) -> str | None:
    turned = table.T
    return next(
        (name for name, one in tables.items() if one.shape == turned.shape and np.array_equal(one, turned)), None
    )


def _save(model: Any, path: Path, *, large: bool) -> None:
    import onnx

    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data" if large else None)
