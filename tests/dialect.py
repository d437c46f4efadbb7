"""List words of the project's former private dialect that remain: `make words`, or `python tests/dialect.py [PATH ...]`.

Each hit is printed as `file:line`, under the phrase and the term that replaces it. The exit code is 1 if there is a hit
that no exception below explains. `--summary` prints the counts only, `--files` the counts by file. Identifiers count:
`_` and a change of case separate words (`cut_apart`, `CutApart`). A phrase that a line break splits is found, too.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_PATHS = ("src", "docs", "README.md", "CONTRIBUTING.md", "recipes", "tests")
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".json", ".jinja", ".html", ".js", ".css", ".svg", ".txt", ".toml"}

# (what to write instead, patterns). A space stands for any white space; patterns match whole words, in any case.
PHRASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "sharded, shard",
        (r"cut(s|ting)? apart", r"cut(s|ting)? [^.;:|]{1,45} apart", r"(is|are|states) cut for (so|as)"),
    ),
    ("frozen", (r"stand(s|ing)? still", r"stood still", r"nothing is learnt by")),
    ("is trained", (r"learnt",)),
    ("temporarily; Within this block ...", (r"for the time(?! being)",)),
    ("collective, all ranks must call", (r"meetings?", r"agree(s|d|ing)?(?! with)")),
    ("warm up (first forward for FSDP); encounter", (r"meets?",)),
    ("requested, configured", (r"asked",)),
    ("configured, logged, passed", (r"told",)),
    ("listen for SIGTERM, on_sigterm, stop requested", (r"hear(s|d|ing)?",)),
    ("reward model; evaluate, score", (r"judg(e|es|ed|ing|e?ments?)",)),
    ("reward function, reward", (r"(who|what) scores",)),
    ("reference model", (r"holds? the policy near", r"kl penalty holds")),
    ("shared-base reward model", (r"rid(e|es|ing)", r"rode")),
    ("active adapter, use_adapter, disable_adapters, copy_adapter", (r"silent(ly)?", r"twin(s|ned)?", r"whose word")),
    ("active; print, name, describe", (r"speak(s|ing)?", r"spoke(n)?")),
    ("fuse kernels, patch; fix", (r"quicken(s|ed|ing)?", r"mend(s|ed|ing)?")),
    ("workaround for <library bug>", (r"without traps", r"traps?")),
    (
        "quantized to 4 bits, 4-bit weights, NF4",
        (
            r"in (so|how|these|as) (few |many )?bits",
            r"in bits",
            r"in [48]( (or|and) [48])? bits",
            r"so (few|many) bits",
        ),
    ),
    ("process, rank, world size, all methods", (r"everybody", r"each of them", r"com(es?|ing) along", r"came along")),
    ("prefix", (r"beginnings", r"(every|each) beginning", r"beginning of (y|an answer|a text)")),
    ("padding-free, packed, padded to a multiple of", (r"whole tiles", r"of like length", r"tiles")),
    ("in-flight, current rollout", (r"under ?way",)),
    ("baseline, bootstrap", (r"(?<!value.)prior(?! (to|work))", r"opinions?")),
    ("logit soft-capping", (r"bend(s|ing)?", r"bent")),
    ("drops the last incomplete batch (drop_last)", (r"what of (the|a|its|it)",)),
    ("measured on <hardware>, <date>", (r"stood", r"the day before", r"before this day")),
    ("is, is written, appears", (r"stands?(?!.(ins?|for)\b)", r"standing")),
    ("again", (r"anew",)),
    ("available", (r"at hand",)),
    ("(leave out)", (r"meanwhile the", r"of (its|their) own")),
    ("flags override the YAML file, which overrides the defaults", (r"three voices", r"voices?")),
    ("how to fix it", (r"names? the remedy", r"remed(y|ies)")),
    ("test_<behaviour>, not a number", (r"test points? \d+", r"points? \d\d")),
)

# (file pattern, pattern of the phrase, pattern of the whole line as it is written, reason).
EXCEPTIONS: tuple[tuple[str, str, str, str], ...] = (
    ("*", r"judge", r"[Gg]old[ _*-]+judge", "the quickstart's gold judge is a term, defined in README"),
    ("*data/forms/meanings.py", r"judge", r"\|judge\|", "a column of chatbot_arena_conversations"),
    ("*", r"judges?", r"[Pp]airwise judge|trl\.\S*judges|TRL's judges|PairRMJudge|BasePairwiseJudge", "TRL's name"),
    ("src/rlhf_recipes/quickstart/world/*", r".*", r"^\s+f?['\"](?!\"\")", "text of the stories is data"),
    (
        "src/rlhf_recipes/quickstart/world/gold.py",
        r"everybody",
        r"bothering",
        "an impolite phrase that is searched for",
    ),
    ("src/rlhf_recipes/quickstart/world/*", r"spoken|speaks?", r".*", "the people of the stories do speak"),
    ("recipes/configs/imdb/README.md", r".*", r"^\|", "samples of a trained model"),
    ("tests/test_packaging.py", r".*", r"mark\.parametrize", "examples for the test of this script"),
    ("CONTRIBUTING.md", r"agree", r"you agree that", "the contributor's licence"),
)


def pattern_of(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Compile phrases into one pattern; a space also matches a line break and a comment sign or quote mark after it."""
    gap = r"(?:[^\S\n]+|[^\S\n]*\n[\s#>*|\"']*)"
    spaced = "|".join(re.sub(r"(?<!\\) (?![?*+])", lambda _: gap, phrase) for phrase in phrases)
    return re.compile(rf"(?<![A-Za-z])(?:{spaced})(?![A-Za-z])", re.IGNORECASE)


PATTERNS = [(replacement, pattern_of(phrases)) for replacement, phrases in PHRASES]


def files_under(paths: list[Path]) -> Iterator[Path]:
    """Yield the text files under `paths`, without this one and without what tools generate."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            generated = any(part.endswith((".egg-info", "__pycache__")) for part in file.parts)
            if file.is_file() and file.suffix in SUFFIXES and not generated and file != Path(__file__).resolve():
                yield file


def hits_in(file: Path) -> Iterator[tuple[str, int, str, str, str | None]]:
    """Yield (replacement, line number, matched words, line, reason of the exception or None) for each hit."""
    name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.as_posix()
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    # Words of identifiers are separated by one character in place of another, so that lines stay the same.
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text.replace("_", " "))
    for replacement, pattern in PATTERNS:
        for match in pattern.finditer(words):
            number = words.count("\n", 0, match.start()) + 1
            line = lines[number - 1]
            phrase = " ".join(match.group().split()).lower()
            reasons = [
                why
                for files, phrases, seen, why in EXCEPTIONS
                if fnmatch(name, files) and re.fullmatch(phrases, phrase) and re.search(seen, line)
            ]
            yield replacement, number, phrase, line.strip(), reasons[0] if reasons else None


def main() -> int:
    """Print what remains; return 1 if anything does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders; by default all that a reader sees")
    parser.add_argument("--summary", action="store_true", help="print the counts by phrase only")
    parser.add_argument("--files", action="store_true", help="print the counts by file only")
    parser.add_argument("--excepted", action="store_true", help="also list the hits that an exception explains")
    options = parser.parse_args()
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    by_file: Counter[str] = Counter()
    excepted: list[str] = []
    for file in files_under([path.resolve() for path in options.paths] or [ROOT / path for path in DEFAULT_PATHS]):
        name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)
        for replacement, number, words, line, reason in hits_in(file):
            if reason:
                excepted.append(f"{name}:{number}: {words} ({reason})")
                continue
            found[replacement].append((words, f"{name}:{number}: {line[:110]}"))
            by_file[name] += 1
    for replacement, hits in sorted(found.items(), key=lambda item: -len(item[1])):
        if not options.files:
            counts = ", ".join(
                f"{words} {count}" for words, count in Counter(words for words, _ in hits).most_common()
            )
            print(f"{len(hits):5}  {counts}  ->  {replacement}")
        if not (options.summary or options.files):
            print("\n".join(f"         {place}" for _, place in hits))
    if options.files:
        print("\n".join(f"{count:5}  {name}" for name, count in by_file.most_common()))
    if options.excepted:
        print("\n".join(excepted))
    print(f"{by_file.total()} hits in {len(by_file)} files; {len(excepted)} explained by exceptions")
    return int(bool(by_file))


if __name__ == "__main__":
    sys.exit(main())
