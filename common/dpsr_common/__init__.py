"""The parts that every package of DPSR builds on. Importing this package imports nothing else."""
