"""What all packages of DPSR stand on. Importing this package imports nothing else."""
