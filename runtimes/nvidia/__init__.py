"""2:4 sparsity on NVIDIA GPUs: cuSPARSELt and TensorRT."""
