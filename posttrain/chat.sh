#!/usr/bin/env bash
# Sample dialogues with the exported model.
# Usage: posttrain/chat.sh [RUNFILE] [KEY=VALUE ...]
runfile=configs/glm45/tiny.yaml
case "${1:-}" in ""|*=*|-*) ;; *) runfile=$1; shift ;; esac
glm=$(dirname "$0")/../.venv/bin/glm; [ -x "$glm" ] || glm=glm
exec "$glm" run "$runfile" chat "$@"
