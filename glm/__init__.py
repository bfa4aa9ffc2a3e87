"""The open GLM-4.5 pretrain-to-RL training suite."""

__version__ = "0.1.0"
