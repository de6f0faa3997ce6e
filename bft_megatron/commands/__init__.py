"""What each command does with a checked request."""
