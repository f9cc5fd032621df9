"""The signals that asked the program to end."""

#: The exit code of a program that Ctrl-C has ended, as shells count it.
INTERRUPTED = 130

#: What a handler raises is lost where other code catches everything, as torch and NumPy do around imports of theirs: so
#: this is asked again before something is replaced, and where a command ends.
asked_to_end: list[int] = []

#: What there is to say of an interrupted command: what it has kept, and how to continue.
advice: list[str] = []
