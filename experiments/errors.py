"""What was wrong with what a run was given, said in one line."""

# What wrong options, and what cannot be read or written, raise; anything else is a fault of the program's own.
OF_INPUTS = (ValueError, OSError, FloatingPointError)


def first_line(error: BaseException) -> str:
    """The first line that an error says; its type, where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
