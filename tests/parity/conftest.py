"""The host platform, before any test module imports megatron; and what was measured, after the last test."""

from glm import platform

platform.activate("host")


def pytest_terminal_summary(terminalreporter):
    from tests.parity.compare import TOLERANCES, measured

    if measured:
        terminalreporter.section("parity: largest differences measured")
    for kind, (largest, where) in measured.items():
        terminalreporter.write_line(f"{kind:24s} {largest:.1e}  (tolerance {TOLERANCES[kind]:.0e})  {where}")
