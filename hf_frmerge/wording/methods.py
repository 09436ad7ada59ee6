"""Names and descriptions of methods, spaces, blocks, norms and dtypes, and BibTeX entries of papers."""

from __future__ import annotations

from hf_frmerge.checkpoints.tensors.floats import DTYPE_CODES
from hf_frmerge.methods.method import Method, Paper
from hf_frmerge.methods.table import METHODS

DTYPES = {code: name for name, code in DTYPE_CODES.items()}
"""Name of a dtype in safetensors -> its name in torch."""

SPACES = {
    "weights": "What is merged are the experts' weights themselves.",
    "deltas": "What is merged are the experts' changes against the base model (their deltas), not their weights.",
}
POINTS = {"weights": "weights", "deltas": "deltas (differences to the base)"}
"""Space -> what the angles between experts are measured on."""

BLOCKS = {
    "tensor": "one weight tensor",
    "row": "one row of a weight tensor",
    "head": "one attention head",
    "layer": "all tensors of one layer",
    "model": "the whole model",
}
NORMS = {
    "mean": "the weighted mean of the experts' lengths",
    "median": "the weighted median of the experts' lengths",
    "max": "the greatest of the experts' lengths",
}


def method_of(name: str) -> Method:
    """
    Return the method `name`; for an unknown one, a method with nothing but the name.

    A record may name a method that this version does not have.
    """
    title = name.replace("_", " ").replace("-", " ").strip() or name
    return METHODS.get(name) or Method(name, "span", title, "", "", tags=(name.replace("_", "-"),))


def bibtex(paper: Paper) -> str:
    """Format a paper as a BibTeX entry; acronyms in the title get braces, which keep their capitals."""
    authors = [_last_name_first(author) for author in paper.authors.split(", ")]
    key = authors[0].partition(",")[0].lower() + str(paper.year) + _first_word(paper.title)
    fields = {
        "title": " ".join(map(_braced, paper.title.replace("–", "--").split(" "))),
        "author": " and ".join(authors),
        "year": str(paper.year),
        "eprint": paper.arxiv,
        "archivePrefix": "arXiv",
    }
    lines = ",\n".join(f"  {name:13} = {{{value}}}" for name, value in fields.items())
    return f"@article{{{key},\n{lines}\n}}"


def _last_name_first(author: str) -> str:
    first, _, last = author.rpartition(" ")
    return f"{last}, {first}"


def _first_word(title: str) -> str:
    return title.lower().replace("-", " ").replace(":", " ").split(" ")[0]


def _braced(word: str) -> str:
    """Put an acronym in braces, `{LLM}`: bibliography styles set titles in lower case."""
    bare = word.rstrip(":,")
    is_acronym = any(letter.isupper() for part in bare.split("-") for letter in part[1:])
    return f"{{{bare}}}{word[len(bare) :]}" if is_acronym or "--" in bare else word
