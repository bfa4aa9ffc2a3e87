#!/usr/bin/env bash
# Mid-training on long contexts: 100B tokens at 128K at full size.
# Usage: midtrain/long_context.sh [RUNFILE] [KEY=VALUE ...]
exec glm run "${1:-configs/glm45/tiny.yaml}" midtrain_long_context "${@:2}"
