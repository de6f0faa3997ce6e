"""One number on any layout: whole runs over real processes, held to a plain float64 reference and to one process."""
