#!/usr/bin/env bash
# The trained model as a Hugging Face folder.
# Usage: posttrain/export.sh [RUNFILE] [KEY=VALUE ...]
exec glm run "${1:-configs/glm45/tiny.yaml}" export "${@:2}"
