"""Checkpoint folders to Hugging Face folders and back, and the proof that both hold the same model."""
