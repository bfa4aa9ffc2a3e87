"""Scores of finished replies."""
