#!/usr/bin/env bash
# Supervised fine-tuning before reinforcement learning.
# Usage: posttrain/sft_cold_start.sh [RUNFILE] [KEY=VALUE ...]
exec glm run "${1:-configs/glm45/tiny.yaml}" sft_cold_start "${@:2}"
