"""Calculate the memory that PPO takes on each of 1, 8 and 64 GPUs, for docs/scaling.md.

    python benchmarks/arithmetic.py

In GB (10^9 bytes) per GPU. Nothing is measured; docs/memory.md has measurements of GPT-2 on one CPU. Assumptions:

- Trained weights are float32 with float32 gradients and two float32 moments of AdamW: 16 bytes per parameter. FSDP2
  shards them over the GPUs, data parallelism does not.
- Forward and backward passes run in bfloat16, with a copy of the weights: 2 bytes per parameter, unsharded while
  answers are generated.
- The reference and the reward model are frozen, in bfloat16: 2 bytes per parameter. With LoRA the base is the
  reference.
- A LoRA of rank 16 on every projection trains 1 % of the parameters. A 4-bit base takes 0.56 bytes per parameter (NF4,
  blocks of 64, double quantization), with embeddings in bfloat16.
- Activations of a micro-batch of 8 rows of 512 tokens take 34 bytes per token, hidden unit and layer (Korthikanti et
  al. 2022, without attention scores, which fused attention does not store), or 2 with gradient checkpointing.
- The KV cache of 64 answers of 512 tokens takes 4 bytes per token, hidden unit and layer."""

from typing import NamedTuple

GPUS = (1, 8, 64)
GB = 1e9


class Shape(NamedTuple):
    """Size of a model; `embeddings` are part of `parameters`."""

    name: str
    parameters: float
    embeddings: float
    layers: int
    hidden: int


SHAPES = (
    Shape("GPT-2 (124M)", 124.4e6, 39.4e6, 12, 768),
    Shape("GPT-2 XL (1.56B)", 1557.6e6, 82.0e6, 48, 1600),
    Shape("7B (Llama 2)", 6738.4e6, 262.1e6, 32, 4096),
)
MODES = ("full, data parallel", "full, FSDP2", "LoRA, data parallel", "LoRA on a 4-bit base, data parallel")


def gigabytes(shape: Shape, mode: str, gpus: int) -> float:
    """Return the memory of one GPU in GB."""
    count, tokens = shape.parameters, 8 * 512
    shards = gpus if "FSDP2" in mode else 1
    reward_model = 2 * count
    if mode.startswith("full"):
        weights = 16 * count / shards + 2 * count + 2 * count + reward_model  # trained, bfloat16 copy, reference
    else:
        base = 0.56 * (count - shape.embeddings) + 2 * shape.embeddings if "4-bit" in mode else 2 * count
        weights = base + 16 * 0.01 * count + (base if "4-bit" in mode else reward_model)
    activations = (2 if shape.parameters > 1e9 else 34) * tokens * shape.hidden * shape.layers
    cache = 4 * 64 * 512 * shape.hidden * shape.layers
    return (weights + max(activations, cache)) / GB  # rollout and update take turns


def table() -> str:
    """Return the Markdown table: one row per model, one column per mode."""
    lines = ["| model | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
    for shape in SHAPES:
        cells = []
        for mode in MODES:
            needed = [gigabytes(shape, mode, gpus) for gpus in (GPUS if "FSDP2" in mode else (1,))]
            cells.append(" / ".join(f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in needed))
        lines.append(f"| {shape.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
