"""DeepSparse, in a worker process with its own interpreter."""
