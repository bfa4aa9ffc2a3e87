#!/usr/bin/env bash
# Pre-training on code, mathematics and science: 7T tokens at full size.
# Usage: pretrain/code_reasoning.sh [RUNFILE] [KEY=VALUE ...]
runfile=configs/glm45/tiny.yaml
case "${1:-}" in ""|*=*|-*) ;; *) runfile=$1; shift ;; esac
glm=$(dirname "$0")/../.venv/bin/glm; [ -x "$glm" ] || glm=glm
exec "$glm" run "$runfile" pretrain_code_reasoning "$@"
