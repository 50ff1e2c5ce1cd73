"""Where results say they are from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

import token_sparse_attention
from token_sparse_attention.info import provenance


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit_seen_from(folder):
    """What `commit` says of the copy of the package in `folder`."""
    code = "import token_sparse_attention.info as info; print(info.__file__, info.commit())"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    file, commit = done.stdout.split()
    assert Path(file).is_relative_to(folder)
    return commit


def test_commit_is_of_a_checkout_of_this_package_only(tmp_path):
    shutil.copytree(
        Path(token_sparse_attention.__file__).parent,
        tmp_path / "token_sparse_attention",
        ignore=shutil.ignore_patterns("bundled", "__pycache__"),
    )
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "another project's")
    assert commit_seen_from(tmp_path) == "None", "merely installed inside that repository"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "its own")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit_seen_from(tmp_path) == head
    (tmp_path / "token_sparse_attention" / "__init__.py").write_text("changed = True\n")
    assert commit_seen_from(tmp_path) == f"{head}-dirty"


def test_provenance_names_device_and_versions():
    found = provenance("cpu")
    assert found["device"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["token-sparse-attention"] == token_sparse_attention.__version__
