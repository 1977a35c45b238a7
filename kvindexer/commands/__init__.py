"""What each command does: one module a command, with `run(options) -> exit code`."""
