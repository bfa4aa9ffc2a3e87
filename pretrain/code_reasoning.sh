#!/usr/bin/env bash
# Pre-training on code, mathematics and science: 7T tokens at full size.
# Usage: pretrain/code_reasoning.sh [RUNFILE] [KEY=VALUE ...]
exec glm run "${1:-configs/glm45/tiny.yaml}" pretrain_code_reasoning "${@:2}"
