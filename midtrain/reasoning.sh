#!/usr/bin/env bash
# Mid-training on synthetic reasoning: 500B tokens at 32K at full size.
# Usage: midtrain/reasoning.sh [RUNFILE] [KEY=VALUE ...]
runfile=configs/glm45/tiny.yaml
case "${1:-}" in ""|*=*|-*) ;; *) runfile=$1; shift ;; esac
glm=$(dirname "$0")/../.venv/bin/glm; [ -x "$glm" ] || glm=glm
exec "$glm" run "$runfile" midtrain_reasoning "$@"
