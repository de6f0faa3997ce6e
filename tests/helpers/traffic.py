"""How many bytes the objective gives to collectives: the formula that the benchmark of the same name computes with."""

from __future__ import annotations


def objective(
    tokens: int, samples: int, context: int, gathered: int = 0, entropy: bool = False, sources: int = 1
) -> dict[str, int]:
    """Bytes that a rank gives to all-reduces of the objective, by group.

    Args:
        tokens: of a micro-batch on a context-parallel rank; over the head without logits the supervised ones.
        samples: of a micro-batch, counting a packed row's tail as one.
        context: ranks of context parallelism.
        gathered: with `cp_windows: exact`, the most supervised tokens of any rank, which an all-gather brings.
        sources: of the data, which are reported apart.

    Returns: "tensor": of a micro-batch, a MAX of fp32 and a SUM of two (with the entropy three) fp64 a token;
        "context": of a micro-batch, a MIN and a SUM of fp64 a sample, and the all-gather's fp32 a token;
        "step": of a step, over data x context, the report's eleven sums and a minimum of a source, in fp64. Megatron
        adds the divisor and the loss it prints, 12 bytes.
    """
    return {
        "tensor": (4 + 16 + 8 * entropy) * tokens,
        "context": (16 * samples + 4 * gathered) * (context > 1),
        "step": 12 * 8 * sources,
    }
