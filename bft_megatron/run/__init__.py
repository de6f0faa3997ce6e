"""A run's folder and its prepared rows."""
