"""A sandbox for programs that nobody has read: run in bubblewrap (process), judged by tests (passing)."""

from sandbox.child import CandidateError
from sandbox.process import (
    ENVIRONMENT,
    LIMITS,
    UNSAFE,
    Isolation,
    ProgramOutcome,
    SandboxLimits,
    Verdict,
    calls,
    end_all,
    isolation,
    judge,
    run,
)

__all__ = [
    "ENVIRONMENT",
    "LIMITS",
    "UNSAFE",
    "CandidateError",
    "Isolation",
    "ProgramOutcome",
    "SandboxLimits",
    "Verdict",
    "calls",
    "end_all",
    "isolation",
    "judge",
    "run",
]
