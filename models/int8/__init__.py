"""Networks in int8: which tensors are quantised, on what grid, and how that is written as standard ONNX (QDQ)."""
