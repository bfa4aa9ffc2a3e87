#!/usr/bin/env bash
# Sample dialogues with the exported model.
# Usage: posttrain/chat.sh [RUNFILE] [KEY=VALUE ...]
exec glm run "${1:-configs/glm45/tiny.yaml}" chat "${@:2}"
