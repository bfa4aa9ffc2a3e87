#!/usr/bin/env bash
# What mid-training reads: repositories, reasoning, long documents, trajectories to tokenized corpora.
# Usage: midtrain/prepare.sh [RUNFILE] [KEY=VALUE ...]
runfile=configs/glm45/tiny.yaml
case "${1:-}" in ""|*=*|-*) ;; *) runfile=$1; shift ;; esac
glm=$(dirname "$0")/../.venv/bin/glm; [ -x "$glm" ] || glm=glm
exec "$glm" run "$runfile" prepare_midtrain "$@"
