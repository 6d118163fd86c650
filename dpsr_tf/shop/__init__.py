"""The generated shop: its words, catalogue, users, click log and judgments."""
