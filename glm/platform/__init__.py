"""The only package that knows what a device is.

``activate(name)`` is called once in every process that trains, before anything of megatron is imported. The name comes
from the recipe and is checked against the machine, never guessed: a node with a broken driver must not quietly train
on its CPUs.
"""

__all__ = ["Platform", "activate", "active"]


def __getattr__(name: str):
    """Imports torch only for who asks for a device: the launcher and ``glm doctor`` live without it."""
    if name in __all__:
        from glm.platform import interface

        return getattr(interface, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
