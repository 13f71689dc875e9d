"""Headers parsed once for all kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from poise.optim.engine import headers

GCC = "Copyright (C) Free Software Foundation, Inc."


def compiler(folder: Path, says: str, ends: int = 0) -> list[str]:
    """The command line of a stand-in that writes down what it was asked for."""
    program = folder / "my g++"
    program.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && echo "{says}" && exit 0
echo "$@" >> "{folder}/asked"
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo parsed > "$2"; shift; done
exit {ends}
"""
    )
    program.chmod(0o755)
    return [str(program), "kernel.cpp", "-O3", "-I/an include", "-shared", "-o", "./kernel.so", "-ltorch", "-L/libraries"]


def test_the_first_kernel_does_not_wait_and_the_next_ones_share_what_was_parsed(tmp_path: Path) -> None:
    kept = tmp_path / "kernels and more"
    kept.mkdir()
    command = compiler(tmp_path, GCC)
    headers.parsed(command, kept)
    header = headers.parsed(command, kept)
    assert header is not None and header.parent == kept
    assert header.read_text() == headers.TEXT
    assert header.with_name(f"{header.name}.gch").read_text() == "parsed\n"
    assert headers.parsed(command, kept) == header
    assert (tmp_path / "asked").read_text() == "-O3 -I/an include -x c++-header prefix.h -o prefix.gch\n"


def test_other_flags_have_a_header_of_their_own(tmp_path: Path) -> None:
    command = compiler(tmp_path, GCC)
    for flags in (command, [*command, "-g"]):
        headers.parsed(flags, tmp_path)
    first, second = (headers.parsed(flags, tmp_path) for flags in (command, [*command, "-g"]))
    assert first is not None and second is not None and first != second


@pytest.mark.parametrize("says, ends, asked", [("clang version 19", 0, False), (GCC, 1, True)])
def test_kernels_do_without_where_it_cannot_be_done(tmp_path: Path, says: str, ends: int, asked: bool) -> None:
    command = compiler(tmp_path, says, ends)
    for _ in range(3):
        assert headers.parsed(command, tmp_path) is None
    assert (tmp_path / "asked").exists() == asked
    assert not list(tmp_path.glob("*.gch"))
