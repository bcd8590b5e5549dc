"""What `python -m benchmarks.gpu_check` runs on a machine with a GPU, one file a concern."""
