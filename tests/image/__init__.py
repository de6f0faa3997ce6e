"""The Dockerfile, built: `make test-image`, as root, with Debian's buildah and debootstrap."""
