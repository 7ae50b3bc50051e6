"""Check a written graph against the ONNX standard."""

from __future__ import annotations

from pathlib import Path

import onnx

from ....errors import CompilerError


def check_onnx(path: Path) -> None:
    """Check every op, type and shape that the standard knows.

    Raises:
        CompilerError: ONNX_INVALID.
    """
    model = onnx.load(path, load_external_data=False)
    try:
        onnx.checker.check_model(_without_bytes(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CompilerError(
            "ONNX_INVALID", f"{path.name} breaks the ONNX standard: {error}", "Report the model; this is a defect."
        ) from error


def _without_bytes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn external weights into inputs: the checker would look for their files, some of which are made at load."""
    kept = []
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            kept.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model
