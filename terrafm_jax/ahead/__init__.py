"""What the compilers for TPU and GPU make of a program on a machine without either: HLO, time, memory; scaling."""
