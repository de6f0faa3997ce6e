"""`python -m bft_megatron` and `bft-megatron`: the command line. A rank listens to signals before all else."""

import os


def main() -> None:
    """Entry point."""
    if "RANK" in os.environ:
        from bft_megatron.processes import signals

        signals.listen()
    from bft_megatron import cli

    cli.main()


if __name__ == "__main__":  # Megatron's checkpoint writer may import the main module again in a helper process
    main()
