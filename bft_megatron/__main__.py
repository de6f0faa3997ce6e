"""`python -m bft_megatron` and `bft-megatron`: the command line. A process listens to signals before all else."""

import sys

from bft_megatron.processes import ranks, signals


def main() -> None:
    """Entry point."""
    signals.listen() if ranks.in_rank() else signals.end_on_signals()
    from bft_megatron.processes import streams

    streams.open_closed()
    streams.outlive_readers()
    try:
        from bft_megatron import cli
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("bft_megatron"):
            raise
        print(
            f"error: {error.name} is missing: the command needs this package's extras hf and megatron", file=sys.stderr
        )
        sys.exit(2)
    cli.main()


if __name__ == "__main__":  # Megatron's checkpoint writer may import the main module again in a helper process
    main()
