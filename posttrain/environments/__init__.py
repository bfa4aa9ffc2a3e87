"""Environments of reinforcement learning, by name."""

from posttrain.environments.registry import Environment, Prompt, environment, register

__all__ = ["Environment", "Prompt", "environment", "register"]
