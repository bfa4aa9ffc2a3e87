"""Starting ranks, watching them, and what is written around a stage."""
