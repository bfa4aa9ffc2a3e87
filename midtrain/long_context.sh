#!/usr/bin/env bash
# Mid-training on long contexts: 100B tokens at 128K at full size.
# Usage: midtrain/long_context.sh [RUNFILE] [KEY=VALUE ...]
runfile=configs/glm45/tiny.yaml
case "${1:-}" in ""|*=*|-*) ;; *) runfile=$1; shift ;; esac
glm=$(dirname "$0")/../.venv/bin/glm; [ -x "$glm" ] || glm=glm
exec "$glm" run "$runfile" midtrain_long_context "$@"
