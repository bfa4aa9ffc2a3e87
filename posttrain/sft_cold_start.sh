#!/usr/bin/env bash
# Supervised fine-tuning before reinforcement learning.
# Usage: posttrain/sft_cold_start.sh [RUNFILE] [KEY=VALUE ...]
runfile=configs/glm45/tiny.yaml
case "${1:-}" in ""|*=*|-*) ;; *) runfile=$1; shift ;; esac
glm=$(dirname "$0")/../.venv/bin/glm; [ -x "$glm" ] || glm=glm
exec "$glm" run "$runfile" sft_cold_start "$@"
