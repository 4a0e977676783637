"""Eight bits: a network in floating point becomes one in int8, by the calibration samples alone.

Ranges of what flows, weights rounded with the layers' Hessians, biases corrected, all written as standard ONNX.
"""
