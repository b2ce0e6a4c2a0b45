"""The command line: flags, their help, and the command that they make."""
