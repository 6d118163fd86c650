"""The parts that every package of DPSR builds on. Importing this package imports nothing else."""

# The version of all packages. pyproject.toml reads it here.
__version__ = "0.2.0"
