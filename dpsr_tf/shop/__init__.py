"""The generated shop: its words, its world, its log, its judgments."""
