"""The one table of floors and rooms: tests/test_layers.py holds it, CONTRIBUTING.md prints it.

A file imports from strictly lower floors or from its own room. Rooms of one floor do not know one another.
"""

FLOORS: list[dict[str, str]] = [
    {"core": "arguments, errors, files, Markdown, secrets, tensors; imported file by file"},
    {"system": "the machine: hardware, launcher, DeepSpeed and FSDP, workarounds for library bugs"},
    {
        "models": "what a model is: sources, loading, adapters, quantization",
        "optimizations": "speed without other results: attention, packing, prepacked weights, KV cache, frozen layers",
        "folders": "what a stage leaves: output folder, model card, checkpoints, lock",
    },
    {
        "data": "datasets, their formats and checks, chat templates, prompts",
        "reports": "what people look at: charts, plots, pages, numbers as text",
        "hub": "pushing folders to the Hugging Face Hub",
    },
    {
        "generation": "prompts to answers",
        "scoring": "answers to rewards",
    },
    {"training": "what every trainer shares: SafeTrainer, the run around it, defaults, signals"},
    {
        "ppo": "the PPO trainer",
        "evaluation": "measuring models: perplexity, classification, preferences, samples",
        "quickstart": "the quickstart's world, its gold judge, its report",
    },
    {"stages": "verbs: one stage a file, named like its recipe"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def table() -> str:
    """Return the table as Markdown, the highest floor first."""
    lines = [
        "| floor | room | is |",
        "|---|---|---|",
        f"| {len(FLOORS)} | `recipes/` | the doors: `from rlhf_recipes import ...`, nothing else |",
    ]
    for floor, rooms in reversed(list(enumerate(FLOORS))):
        lines += [f"| {floor} | `{room}/` | {purpose} |" for room, purpose in rooms.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
