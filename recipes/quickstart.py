"""Run the whole pipeline on a small generated world, in about five minutes on a CPU.

In      nothing: the world, its corpus, demonstrations, preferences and prompts are generated from the seed
Out     a folder with the folder of every stage, metrics.json, report.html and report.md
Launch  python recipes/quickstart.py --seed 0
Next    recipes/configs/imdb: the same stages on movie reviews
Docs    docs/quickstart.md
"""

from rlhf_recipes import QuickstartArguments, one_line_errors, parse_arguments, run_quickstart


def main() -> None:
    with one_line_errors():
        run_quickstart(*parse_arguments(QuickstartArguments))


if __name__ == "__main__":
    main()
