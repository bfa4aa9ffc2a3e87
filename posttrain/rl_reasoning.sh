#!/usr/bin/env bash
# Reinforcement learning on problems with verifiable answers.
# Usage: posttrain/rl_reasoning.sh [RUNFILE] [KEY=VALUE ...]
runfile=configs/glm45/tiny.yaml
case "${1:-}" in ""|*=*|-*) ;; *) runfile=$1; shift ;; esac
glm=$(dirname "$0")/../.venv/bin/glm; [ -x "$glm" ] || glm=glm
exec "$glm" run "$runfile" rl_reasoning "$@"
