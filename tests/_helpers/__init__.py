"""What the op tests share: data, float64 oracles, processes, kernel tables."""
