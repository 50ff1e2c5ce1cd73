"""The Debian packages that the training text and the word lists come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """One Debian package and the part of it that is used."""

    name: str
    licence: str
    folder: str
    """Folder inside the unpacked package."""
    patterns: tuple[str, ...] = ()
    """Glob patterns of the HTML pages under ``folder``."""


PROSE = (
    Package("sqlite3-doc", "public domain", "usr/share/doc/sqlite3", ("*.html", "*/*.html")),
    Package(
        "postgresql-doc-15", "PostgreSQL", "usr/share/doc/postgresql-doc-15/html", ("*.html",)
    ),
    Package(
        "python3.11-doc",
        "PSF-2.0",
        "usr/share/doc/python3.11/html",
        ("*/*.html",),
    ),
    Package(
        "python-django-doc",
        "BSD-3-Clause",
        "usr/share/doc/python-django-doc/html",
        ("topics/**/*.html", "ref/**/*.html", "howto/**/*.html", "intro/*.html", "faq/*.html"),
    ),
    Package(
        "python-sqlalchemy-doc",
        "MIT",
        "usr/share/doc/python-sqlalchemy-doc/html",
        ("orm/**/*.html", "core/*.html", "dialects/*.html", "faq/*.html"),
    ),
    Package(
        "apache2-doc",
        "Apache-2.0",
        "usr/share/doc/apache2-doc/manual/en",
        ("**/*.html",),
    ),
    Package(
        "rust-doc",
        "MIT or Apache-2.0",
        "usr/share/doc/rust-doc/html",
        (
            "book/ch*.html",
            "rust-by-example/**/*.html",
            "reference/**/*.html",
            "nomicon/*.html",
            "embedded-book/**/*.html",
            "edition-guide/**/*.html",
            "rustc/**/*.html",
            "rustdoc/**/*.html",
        ),
    ),
    Package("nodejs-doc", "MIT", "usr/share/doc/nodejs/api", ("*.html",)),
)
"""Packages that are read as HTML pages."""

BIBLE = Package("bible-kjv-text", "public domain", "usr/lib")
BIBLE_READER = Package("bible-kjv", "GPL-2+ (the program; run, not learnt from)", "usr/bin")
JARGON = Package("dict-jargon", "public domain", "usr/share/dictd")
WORDS = Package("wamerican", "SCOWL", "usr/share/dict")
WORDNET = Package("wordnet-base", "WordNet-3.0", "usr/share/wordnet")

LEARNT = (*PROSE, BIBLE, JARGON, WORDS, WORDNET)
"""Everything whose content reaches the model."""

ALL = (*LEARNT, BIBLE_READER)
"""Everything that has to be unpacked."""
