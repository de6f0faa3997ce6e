"""`python -m bft_megatron` and `bft-megatron`: the command line. A rank listens to signals before all else."""

from bft_megatron.processes import ranks


def main() -> None:
    """Entry point."""
    if ranks.in_rank():
        from bft_megatron.processes import signals

        signals.listen()
    from bft_megatron import cli

    cli.main()


if __name__ == "__main__":  # Megatron's checkpoint writer may import the main module again in a helper process
    main()
