"""The two towers and their loss."""
