"""Make the texts that come with hfquant: python packaged_texts.py --novels FILE FILE --wikitext FOLDER --code FOLDER

--novels: what to calibrate on, and what to measure on.  --wikitext: wiki.valid.raw and wiki.test.raw of WikiText-2.
--code: a checkout of hfquant.  The files written are those of `hfquant/model/data`: the same input gives the same
bytes.
"""

import argparse
import gzip
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import hfquant.model
from hfquant.model.texts import END

OUT = Path(hfquant.model.__file__).parent / "data"
BYTES = {  # of each text
    "calibration": {"novels": 230_000, "encyclopedia": 230_000, "code": 170_000},
    "evaluation": {"novels": 110_000, "encyclopedia": 110_000, "code": 80_000},
}
PASSAGE = {"calibration": 9_000, "evaluation": 4_000}  # bytes, about: 2,048 and 1,024 tokens
TITLE = re.compile(r"\n (?== [^=])")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=Path, nargs=2, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--code", type=Path, required=True)
    options = parser.parse_args()
    code = list(files(options.code))
    for name, novels, wiki, half in zip(BYTES, options.novels, ("valid", "test"), (0, 1), strict=True):
        articles = TITLE.split((options.wikitext / f"wiki.{wiki}.raw").read_text("utf-8"))
        texts = {
            "novels": [novels.read_text("utf-8")],
            "encyclopedia": [readable(article) for article in articles if len(article) > 1_000],
            "code": code[half::2],
        }
        for kind, whole in texts.items():
            write(f"{name}_{kind}", chosen(whole, BYTES[name][kind], PASSAGE[name]))


def files(checkout: Path) -> Iterator[str]:
    """Pages and modules, in an order that has nothing to do with what they are about."""
    found = [*checkout.glob("docs/*.md"), *checkout.glob("hfquant/**/*.py"), *checkout.glob("space_app/**/*.py")]
    found = [path for path in sorted(found) if path.stat().st_size > 2_000]
    random.Random(0).shuffle(found)
    return (path.read_text("utf-8") for path in found)


def readable(article: str) -> str:
    """WikiText as Wikipedia has it: its tokenization undone, headings marked as in Markdown."""
    text = re.sub(r" @([-.,])@ ", r"\1", article)
    text = re.sub(r" ([,.;:!?)\]}%]|'s\b|'t\b|n't\b|'re\b|'ve\b|'ll\b|'d\b|'m\b)", r"\1", text)
    text = re.sub(r"([(\[{$£]) ", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    text = re.sub(r"^ *(=(?: =)*) (.+?) \1 *$", lambda m: "#" * m[1].count("=") + " " + m[2], text, flags=re.MULTILINE)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip()) + "\n"


def chosen(texts: Sequence[str], most: int, size: int) -> list[str]:
    """Passages of about `size` bytes, whole lines each, drawn from all the texts; about `most` bytes in all."""
    found = [passage for text in texts for passage in passages(text, size)]
    random.Random(0).shuffle(found)
    kept, taken = [], 0
    for passage in found:
        if taken >= most:
            break
        kept.append(passage)
        taken += len(passage.encode())
    return kept


def passages(text: str, size: int) -> Iterator[str]:
    begun: list[str] = []
    for line in text.splitlines():
        begun.append(line)
        if sum(map(len, begun)) >= size and not line.startswith((" ", "#")):
            yield "\n".join(begun).strip("\n")
            begun = []
    if sum(map(len, begun)) > size // 4:
        yield "\n".join(begun).strip("\n")


def write(name: str, kept: Sequence[str]) -> None:
    raw = gzip.compress(END.join(kept).encode(), 9, mtime=0)
    (OUT / f"{name}.txt.gz").write_bytes(raw)
    print(f"{name}: {len(kept)} passages, {sum(map(len, kept)):,} characters, {len(raw):,} bytes")


if __name__ == "__main__":
    main()
