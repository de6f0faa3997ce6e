"""The launch scripts on a private Slurm of several nodes: `make test-slurm`, as root, with Debian's packages."""
