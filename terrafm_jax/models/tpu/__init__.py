"""What only a TPU runs: attention and fusion as Pallas kernels, each equal by test to its form outside."""
