"""Reinforcement learning: rollouts in SGLang, verified rewards, group-relative updates in megatron, proved weight sync."""
