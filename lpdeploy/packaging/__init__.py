"""Folders that a server opens as they are, each with the command that opens it."""
