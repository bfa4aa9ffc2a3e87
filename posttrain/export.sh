#!/usr/bin/env bash
# The trained model as a Hugging Face folder.
# Usage: posttrain/export.sh [RUNFILE] [KEY=VALUE ...]
runfile=configs/glm45/tiny.yaml
case "${1:-}" in ""|*=*|-*) ;; *) runfile=$1; shift ;; esac
glm=$(dirname "$0")/../.venv/bin/glm; [ -x "$glm" ] || glm=glm
exec "$glm" run "$runfile" export "$@"
