"""The one table of floors and rooms: tests/test_layers.py holds it, CONTRIBUTING.md prints it.

A file imports from strictly lower floors or from its own room. Rooms of one floor do not know one another.
"""

FLOORS: list[dict[str, str]] = [
    {"core": "arguments, errors, files, Markdown, secrets, tensors; imported file by file"},
    {"system": "the machine: hardware, launcher, DeepSpeed and FSDP, workarounds for library bugs"},
    {
        "models": "what a model is: sources, loading, adapters, quantization",
        "optimizations": "speed that changes no result: attention, packing, prepacked weights, KV cache, frozen layers",
        "folders": "what a stage leaves: output folder, model card, checkpoints, lock",
    },
    {
        "data": "datasets, their formats and checks, chat templates, prompts",
        "reports": "charts, plots, pages and numbers for people",
        "hub": "pushing folders to the Hugging Face Hub",
    },
    {
        "generation": "sampling: prompts to answers",
        "scoring": "rewards: answers to scores",
    },
    {"training": "what all trainers share: SafeTrainer, the run around it, defaults, signals"},
    {
        "ppo": "the PPO trainer",
        "evaluation": "measuring models: perplexity, classification, preferences, samples",
        "quickstart": "the quickstart's world, its gold judge, its report",
    },
    {"stages": "one stage per file, named like its recipe"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def table() -> str:
    """Return the table as Markdown, the highest floor first."""
    lines = [
        "| floor | room | is |",
        "|---|---|---|",
        f"| {len(FLOORS)} | `recipes/` | scripts that start a stage; import public names only |",
    ]
    for floor, rooms in reversed(list(enumerate(FLOORS))):
        lines += [f"| {floor} | `{room}/` | {purpose} |" for room, purpose in rooms.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
