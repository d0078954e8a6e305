"""Make the texts that come with hfquant: python packaged_texts.py --novels FILE FILE --wikitext FOLDER --code FOLDER

--novels: what to calibrate on, and what to measure on, as hfquant e1e4b11 had them (calibration.txt, evaluation.txt).
--wikitext: wiki.valid.raw and wiki.test.raw of WikiText-2.  --code: a checkout of that commit.  What was given is told
by its SHA-256; the same input gives the same files in `hfquant/model/data`, and the list of articles in LICENSES.md.
"""

import argparse
import gzip
import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import hfquant.model
from hfquant.model.texts import END

OUT = Path(hfquant.model.__file__).parent / "data"
BYTES = {  # of each text
    "calibration": {"novels": 230_000, "encyclopedia": 230_000, "code": 170_000},
    "evaluation": {"novels": 110_000, "encyclopedia": 110_000, "code": 80_000},
}
PASSAGE = {"calibration": 9_000, "evaluation": 4_000}  # bytes, about: 2,048 and 1,024 tokens
TITLE = re.compile(r"\n (?== [^=])")
ARTICLES = "## Articles\n"

Ends = Callable[[str], bool]  # whether a passage may end with this line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=Path, nargs=2, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--code", type=Path, required=True)
    options = parser.parse_args()
    code, named = list(files(options.code)), {}
    for name, novels, wiki, half in zip(BYTES, options.novels, ("valid", "test"), (0, 1), strict=True):
        raw = told(options.wikitext / f"wiki.{wiki}.raw")
        found = {
            "novels": list(passages(told(novels), PASSAGE[name], ends_paragraph)),
            "encyclopedia": [p for article in TITLE.split(raw) for p in titled(readable(article), PASSAGE[name])],
            "code": [p for text in code[half::2] for p in passages(text, PASSAGE[name], lambda line: not line)],
        }
        for kind, of_kind in found.items():
            kept = chosen(of_kind, BYTES[name][kind])
            write(f"{name}_{kind}", kept)
            if kind == "encyclopedia":
                named[f"{name}_{kind}"] = sorted({passage.split("\n")[0].removeprefix("# ") for passage in kept})
    licences = OUT / "LICENSES.md"
    licences.write_text(
        licences.read_text("utf-8").split(ARTICLES)[0].rstrip() + "\n\n" + ARTICLES + "".join(listed(named)), "utf-8"
    )


def told(path: Path) -> str:
    raw = path.read_bytes()
    print(f"{path.name}: SHA-256 {hashlib.sha256(raw).hexdigest()}")
    return raw.decode()


def files(checkout: Path) -> Iterator[str]:
    """Pages and modules, in an order that has nothing to do with what they are about."""
    found = [*checkout.glob("docs/*.md"), *checkout.glob("hfquant/**/*.py"), *checkout.glob("space_app/**/*.py")]
    found = [path for path in sorted(found) if path.stat().st_size > 2_000]
    random.Random(0).shuffle(found)
    return (path.read_text("utf-8") for path in found)


def readable(article: str) -> str:
    """WikiText as Wikipedia has it: its tokenization undone as far as that can be, headings marked as in Markdown."""
    text = re.sub(r" @([-.,])@ ", r"\1", article)
    text = re.sub(r" ([,.;:!?)\]}%°]|'s\b|'t\b|n't\b|'re\b|'ve\b|'ll\b|'d\b|'m\b)", r"\1", text)
    text = re.sub(r"([(\[{$£]) ", r"\1", text)
    text = re.sub(r"(\d) – (\d)", r"\1–\2", text)
    text = re.sub(r"^ *(=(?: =)*) (.+?) \1 *$", lambda m: "#" * m[1].count("=") + " " + m[2], text, flags=re.MULTILINE)
    lines = (paired(line.strip(), '"') for line in text.splitlines() if line.strip())
    return "\n".join(re.sub(r"s ' ", "s' ", re.sub(r" ' ([^'\n]{1,80}) ' ", r" '\1' ", line)) for line in lines) + "\n"


def paired(line: str, mark: str) -> str:
    """Quotation marks at the words that they belong to, the first of each two opening."""
    words, inside, opens = [""], False, False
    for word in line.split(" "):
        if word != mark:
            words.append(mark + word if opens else word)
            opens = False
            continue
        inside = opens = not inside
        if not inside:
            words[-1] += mark
    return " ".join(words[1:])


def ends_paragraph(line: str) -> bool:
    return not line or (len(line) < 60 and line.endswith((".", "!", "?", "”", '"', "’")))


def titled(article: str, size: int) -> Iterator[str]:
    """Passages of an article, each under its title, as the licence wants it."""
    title, _, _ = article.partition("\n")
    if title.startswith("# "):
        for passage in passages(article, size, lambda line: not line.startswith("#")):
            yield passage if passage.startswith(title) else f"{title}\n{passage}"


def passages(text: str, size: int, ends: Ends) -> Iterator[str]:
    """Whole lines, about `size` bytes each; the rest too, if it is not very short."""
    begun: list[str] = []
    for line in text.splitlines():
        begun.append(line)
        if sum(map(len, begun)) >= size and ends(line):
            yield "\n".join(begun).strip("\n")
            begun = []
    if sum(map(len, begun)) > size // 4:
        yield "\n".join(begun).strip("\n")


def chosen(found: list[str], most: int) -> list[str]:
    """The first, and others as chance has it; about `most` bytes in all."""
    first, *others = found
    random.Random(0).shuffle(others)
    kept, taken = [first], len(first.encode())
    while taken < most and others:
        kept.append(others.pop())
        taken += len(kept[-1].encode())
    return kept


def listed(named: dict[str, list[str]]) -> Iterator[str]:
    for file, titles in named.items():
        yield f"\nOf `{file}`, all by the authors of Wikipedia:\n\n"
        yield from (
            f"* [{title}](https://en.wikipedia.org/wiki/{quote(title.replace(' ', '_'))})\n" for title in titles
        )


def write(name: str, kept: Sequence[str]) -> None:
    raw = gzip.compress(END.join(kept).encode(), 9, mtime=0)
    (OUT / f"{name}.txt.gz").write_bytes(raw)
    print(f"{name}: {len(kept)} passages, {sum(map(len, kept)):,} characters, {len(raw):,} bytes")


if __name__ == "__main__":
    main()
