#!/usr/bin/env bash
# Mid-training on synthetic reasoning: 500B tokens at 32K at full size.
# Usage: midtrain/reasoning.sh [RUNFILE] [KEY=VALUE ...]
exec glm run "${1:-configs/glm45/tiny.yaml}" midtrain_reasoning "${@:2}"
