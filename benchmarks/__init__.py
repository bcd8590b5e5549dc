"""`python -m benchmarks` compares with the peers, `pytest benchmarks` times ours alone."""
