"""The two towers, their loss, and the models that training leaves behind."""
