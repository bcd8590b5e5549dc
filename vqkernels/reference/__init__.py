"""The obvious PyTorch version of every op, the yardstick for its kernels."""
