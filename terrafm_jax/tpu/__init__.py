"""What the TPU compiler says about a program without a TPU: optimized HLO, the time of its schedule, scaling."""
