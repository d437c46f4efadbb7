"""The whole pipeline on a small world of its own, in about five minutes on two CPU cores.

In      nothing: the world, its corpus, demonstrations, preferences and prompts are written from the seed
Out     a folder with every stage's folder in it, metrics.json, report.html and report.md
Launch  python recipes/quickstart.py --seed 0
Next    recipes/configs/imdb: the same stages on movie reviews
"""

from rlhf_recipes import QuickstartArguments, one_line_errors, parse_arguments, run_quickstart


def main() -> None:
    with one_line_errors():
        run_quickstart(*parse_arguments(QuickstartArguments))


if __name__ == "__main__":
    main()
