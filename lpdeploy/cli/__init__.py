"""The command line: one module a command, each of them a thin shell over one function."""
