#!/usr/bin/env bash
# Text to a tokenizer.
# Usage: pretrain/tokenizer.sh [RUNFILE] [KEY=VALUE ...]
exec glm run "${1:-configs/glm45/tiny.yaml}" tokenizer "${@:2}"
