"""The work of each command on a checked request."""
