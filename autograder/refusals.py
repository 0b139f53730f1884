"""Why an answer is refused. Each kind has its own message; nothing else reaches a student."""

NOT_WRITTEN = "not written"
NOT_REPAIRED = "not repaired"
MISSING = "missing"
IMPORT_FAILED = "import failed"
RAISED = "raised"
RETURNED_NONE = "returned None"
WRONG_TYPE = "wrong type"
WRONG_SHAPE = "wrong shape"
WRONG_DTYPE = "wrong dtype"
WRONG_VALUE = "wrong value"
MUTATED = "changed its input"
TOO_SLOW = "out of time"
CRASHED = "ended the process"
UNVERIFIED = "not verified"
NOT_RUN = "not run"
GRADER_FAILED = "grader failed"

# After one of these the other checks of the exercise could only say the same.
FINAL = frozenset({NOT_WRITTEN, MISSING, IMPORT_FAILED, TOO_SLOW, CRASHED})


class Refusal(AssertionError):
    """Why a check refuses an answer: a kind (a constant of this module) and a message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
