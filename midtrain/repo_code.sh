#!/usr/bin/env bash
# Mid-training on whole repositories: 500B tokens at 32K at full size.
# Usage: midtrain/repo_code.sh [RUNFILE] [KEY=VALUE ...]
exec glm run "${1:-configs/glm45/tiny.yaml}" midtrain_repo_code "${@:2}"
