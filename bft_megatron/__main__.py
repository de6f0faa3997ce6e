"""`python -m bft_megatron`: the command line, as the launcher starts its ranks."""

from bft_megatron.cli import main

if __name__ == "__main__":  # Megatron's checkpoint writer may import the main module again in a helper process
    main()
