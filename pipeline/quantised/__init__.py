"""Networks in int8, as a user would make them: by the engines' own tools, in a process of their own.

Results are standard ONNX files with QuantizeLinear and DequantizeLinear, which stand beside a pruned network as what it
has to beat. To add an engine's: a file with a function `quantise` like that of `ort_static.py`, and a line in
`make.QUANTISERS`.
"""
