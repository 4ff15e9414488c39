"""The exceptions of this package.

ShiftDCError
├── InputError         the caller's input is wrong: one sentence, exit code 2, nothing written
├── VerificationError  an exported checkpoint is not what it should be: exit code 1
└── hub.PushError      the Hub did not take a push: exit code 1
"""


class ShiftDCError(Exception):
    """Base of every exception that this package raises on purpose."""


class InputError(ShiftDCError):
    """What was given is wrong. The message says what, where, what was expected and found, and what to do."""


class VerificationError(ShiftDCError):
    """A checkpoint failed its checks."""
