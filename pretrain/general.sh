#!/usr/bin/env bash
# Pre-training on general text: 15T tokens at full size.
# Usage: pretrain/general.sh [RUNFILE] [KEY=VALUE ...]
runfile=configs/glm45/tiny.yaml
case "${1:-}" in ""|*=*|-*) ;; *) runfile=$1; shift ;; esac
glm=$(dirname "$0")/../.venv/bin/glm; [ -x "$glm" ] || glm=glm
exec "$glm" run "$runfile" pretrain_general "$@"
