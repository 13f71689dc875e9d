"""Inductor's C++ made faster: the few places where at::vec goes through memory or scalars call vectors.h instead.

Everything here replaces text that has the expected form and leaves the rest alone: with another version of inductor a kernel is
slower, not wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

PRELUDE = Path(__file__).with_name("vectors.h").read_text()
NARROW = r"u?int\d+_t|at::BFloat16"
LOAD = re.compile(rf"at::vec::Vectorized<({NARROW})>::loadu\(")
LOAD_N = re.compile(r"at::vec::VectorizedN<(u?int\d+_t|float),\s*(\d+)>::loadu\(")
STORE = re.compile(r"(\w+)\.store\(((?:in_|out_|in_out_)ptr\d+ [^;]*), static_cast<int64_t>\((\d+)\)\);")
COUNT_N = re.compile(r"at::vec::VectorizedN<int32_t,\s*(\d+)>::arange\((\w+), 1\)")
BYTES = re.compile(r"at::vec::convert<(u?int8_t)>\((\w+)\)")
COUNT = re.compile(r"at::vec::Vectorized<int32_t>::arange\((\w+), 1\)")
LARGEST = re.compile(r"at::vec::vec_reduce_all<int32_t, 1>\(\[\][^{]*\{ return at::vec::maximum\(x, y\); \}, (\w+)\)")
POINTER = re.compile(r"\* (?=(?:in_|out_|in_out_)ptr\d+\b)")
BITS = re.compile(
    r"\[&\]\(\)\s*\{\s*__at_align__ std::array<(?P<source>\w+), (?P<size>\d+)> tmpbuf0;\s*"
    r"(?P<value>\w+)\.store\(tmpbuf0\.data\(\), static_cast<int64_t>\((?P=size)\)\);\s*"
    r"__at_align__ std::array<(?P<target>\w+), (?P=size)> tmpbuf_out;\s*"
    r"for \(int i = 0; i < static_cast<int64_t>\((?P=size)\); i\+\+\)\s*\{\s*"
    r"tmpbuf_out\[i\] = c10::bit_cast<(?P=target)>\(tmpbuf0\[i\]\);\s*\}\s*"
    r"return\s+at::vec::VectorizedN?<(?P=target)(?:, \d+)?>::loadu"
    r"\(tmpbuf_out\.data\(\), static_cast<int64_t>\((?P=size)\)\);\s*"
    r"\}\s*\(\)"
)
DEFINITION = re.compile(r"(?P<before>\s*auto (?P<name>tmp\d+) = )(?P<value>[^;]*);")
NUMBER = re.compile(r"static_cast<int32_t>\((-?\d+)\)|at::vec::VectorizedN?<int32_t(?:,\s*\d+)?>\((tmp\d+)\)")
OPERATION = re.compile(r"(tmp\d+) (>>|&) (tmp\d+)")
# A report of integer divisions by zero through one variable of the whole process: threads that run kernels at once write over
# each other's, at a cost above that of a small kernel. Without it such a division gives some number, as for floats.
REPORT = re.compile(r"^[^\n]*inductor_cpu_(?:throw_if_)?integer_div_error[^\n]*\n", re.MULTILINE)
WIDE = {"float", "int32_t"}  # both four bytes: what at::vec::cast turns into each other


def faster(source: str) -> str:
    """The same kernel without detours through memory; whatever does not look as expected stays as it is."""

    def bits(found: re.Match[str]) -> str:
        if {found["source"], found["target"]} != WIDE:
            return found[0]
        return f"poise_bits<{found['target']}>({found['value']})"

    source = REPORT.sub("", source)
    source = LOAD_N.sub(r"poise_load_n<\1, \2>(", LOAD.sub(r"poise_load<\1>(", BITS.sub(bits, source)))
    source = LARGEST.sub(r"poise_largest(\1)", source)
    source = COUNT_N.sub(r"poise_count_n<\1>(\2)", source)
    source = BYTES.sub(r"poise_bytes_of(\2, \1())", COUNT.sub(r"poise_count(\1)", source))
    return logical_shifts(STORE.sub(r"poise_store(\1, \2, \3);", source))


def logical_shifts(source: str) -> str:
    """(x >> places) & ones, which is what tensor math has in place of a logical shift, as one instruction."""
    numbers: dict[str, int | None] = {}
    shifted: dict[str, tuple[str, int]] = {}
    lines = source.split("\n")
    for i, line in enumerate(lines):
        definition = DEFINITION.fullmatch(line)
        if definition is None:
            continue
        name, value = definition["name"], definition["value"]
        numbers.pop(name, None)
        shifted.pop(name, None)
        if number := NUMBER.fullmatch(value):
            numbers[name] = int(number[1]) if number[1] else numbers.get(number[2])
        elif operation := OPERATION.fullmatch(value):
            x, sign, y = operation.groups()
            known = numbers.get(y)
            if sign == ">>" and known is not None:
                shifted[name] = (x, known)
            elif sign == "&" and x in shifted and known == 2 ** (32 - shifted[x][1]) - 1:
                lines[i] = f"{definition['before']}poise_shift<{shifted[x][1]}>({shifted[x][0]});"
    return "\n".join(lines)


def unaliased(parameters: str, alone: Sequence[bool]) -> str:
    """A kernel's parameters with those pointers marked to which no other argument is equal.

    What is read through them (scalars, scales) can then stay in registers while results are written.
    """
    if len(POINTER.findall(parameters)) != len(alone):
        return parameters
    marks = iter(alone)
    return POINTER.sub(lambda _: "* __restrict__ " if next(marks) else "* ", parameters)
