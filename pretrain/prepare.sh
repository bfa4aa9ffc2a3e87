#!/usr/bin/env bash
# Raw text to tokenized corpora by source and quality bucket, deduplicated; see docs/data.md.
# Usage: pretrain/prepare.sh [RUNFILE] [KEY=VALUE ...]
runfile=configs/glm45/tiny.yaml
case "${1:-}" in ""|*=*|-*) ;; *) runfile=$1; shift ;; esac
glm=$(dirname "$0")/../.venv/bin/glm; [ -x "$glm" ] || glm=glm
exec "$glm" run "$runfile" prepare_pretrain "$@"
