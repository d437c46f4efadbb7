"""How much memory PPO takes on each of 1, 8 and 64 GPUs, worked out on paper: for docs/scaling.md.

    python benchmarks/arithmetic.py

In GB (10^9 bytes) a GPU. Not measured: docs/memory.md is, for GPT-2 on one CPU. What is assumed:

- trained weights are float32 with float32 gradients and two float32 moments of AdamW, 16 bytes a parameter; FSDP2 cuts
  these over the GPUs, data parallelism does not;
- the forward and backward pass run in bfloat16, of whose weights a copy is held: 2 bytes a parameter, whole while answers
  are generated;
- the reference and the reward model stand still in bfloat16, 2 bytes a parameter; with LoRA the reference is the base itself;
- a LoRA of rank 16 on every projection trains 1% of the parameters; a 4-bit base takes 0.56 bytes a parameter (NF4, blocks
  of 64, double quantization), embeddings in bfloat16;
- activations of a micro-batch of 8 rows of 512 tokens: 34 bytes a token, hidden unit and layer (Korthikanti et al. 2022,
  without attention scores, which no fused attention keeps), or 2 with gradient checkpointing;
- the cache of keys and values of 64 answers of 512 tokens: 4 bytes a token, hidden unit and layer.
"""

from typing import NamedTuple

GPUS = (1, 8, 64)
GB = 1e9


class Shape(NamedTuple):
    name: str
    parameters: float
    embeddings: float  # of the parameters
    layers: int
    hidden: int


SHAPES = (
    Shape("GPT-2 (124M)", 124.4e6, 39.4e6, 12, 768),
    Shape("GPT-2 XL (1.56B)", 1557.6e6, 82.0e6, 48, 1600),
    Shape("7B (Llama 2)", 6738.4e6, 262.1e6, 32, 4096),
)
MODES = ("full, data parallel", "full, FSDP2", "LoRA, data parallel", "LoRA on 4 bits, data parallel")


def gigabytes(shape: Shape, mode: str, gpus: int) -> float:
    """Of one GPU."""
    count, tokens = shape.parameters, 8 * 512
    cut = gpus if "FSDP2" in mode else 1
    reward_model = 2 * count
    if mode.startswith("full"):
        weights = 16 * count / cut + 2 * count + 2 * count + reward_model  # trained, their copy, the reference
    else:
        base = 0.56 * (count - shape.embeddings) + 2 * shape.embeddings if "4 bits" in mode else 2 * count
        weights = base + 16 * 0.01 * count + (base if "4 bits" in mode else reward_model)
    activations = (2 if shape.parameters > 1e9 else 34) * tokens * shape.hidden * shape.layers
    cache = 4 * 64 * 512 * shape.hidden * shape.layers
    return (weights + max(activations, cache)) / GB  # a rollout and an update are not at the same time


def table() -> str:
    lines = ["| model | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
    for shape in SHAPES:
        cells = []
        for mode in MODES:
            needed = [gigabytes(shape, mode, gpus) for gpus in (GPUS if "FSDP2" in mode else (1,))]
            cells.append(" / ".join(f"{each:.0f}" if each >= 10 else f"{each:.1f}" for each in needed))
        lines.append(f"| {shape.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
