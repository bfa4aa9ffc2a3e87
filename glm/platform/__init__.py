"""The only package that knows what a device is.

``activate(name)`` is called once in every process that trains, before anything of megatron is imported. The name comes
from the recipe and is checked against the machine, never guessed: a node with a broken driver must not quietly train
on its CPUs.
"""

from glm.platform.interface import Platform, activate, active

__all__ = ["Platform", "activate", "active"]
