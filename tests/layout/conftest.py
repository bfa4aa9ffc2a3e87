"""The host platform, before any test module imports megatron."""

from glm import platform

platform.activate("host")
