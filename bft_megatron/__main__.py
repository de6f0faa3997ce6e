"""`python -m bft_megatron` and `bft-megatron`: the command line. A process listens to signals before all else."""

import sys

from bft_megatron.processes import ranks, signals


def main() -> None:
    """Entry point."""
    signals.listen() if ranks.in_rank() else signals.end_on_signals()
    from bft_megatron.processes import ending, streams

    streams.open_closed()
    streams.outlive_readers()
    from bft_megatron import cli

    try:
        cli.main()
    finally:
        if ranks.in_rank():
            ending.leave_threads(sys.exception())


if __name__ == "__main__":  # Megatron's checkpoint writer may import the main module again in a helper process
    main()
