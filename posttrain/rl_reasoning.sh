#!/usr/bin/env bash
# Reinforcement learning on problems with verifiable answers.
# Usage: posttrain/rl_reasoning.sh [RUNFILE] [KEY=VALUE ...]
exec glm run "${1:-configs/glm45/tiny.yaml}" rl_reasoning "${@:2}"
