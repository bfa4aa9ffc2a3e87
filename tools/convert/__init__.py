"""Conversion between this suite's checkpoints and Hugging Face folders, from the command line."""
