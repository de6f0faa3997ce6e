"""Random harm, drawn by SEED, for FUZZ_SECONDS: each time the same end, a way back that is said, or a refusal."""
