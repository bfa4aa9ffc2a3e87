#!/usr/bin/env bash
# Pre-training on general text: 15T tokens at full size.
# Usage: pretrain/general.sh [RUNFILE] [KEY=VALUE ...]
exec glm run "${1:-configs/glm45/tiny.yaml}" pretrain_general "${@:2}"
