"""What a TPU compiler says about a program: optimized HLO, the cost of its schedule, and scaling on paper."""
