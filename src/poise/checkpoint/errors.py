"""What can be wrong with weights on disk, said so that the reader can mend it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the file, the tensor if it is one tensor's fault, what is wrong, and the cure.

    Attributes:
        file, tensor: None where there is none to name.
        problem, cure: as they stand in the message.
    """

    def __init__(self, problem: str, *, cure: str, file: Path | str | None = None, tensor: str | None = None) -> None:
        self.file, self.tensor, self.problem, self.cure = file, tensor, problem, cure
        where = [str(file)] if file is not None else []
        if tensor is not None:
            where.append(f"tensor {tensor!r}")
        super().__init__(": ".join([*where, f"{problem}; {cure}"]))

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker hands it to the process that started it, and an exception is made anew from its message alone
        return partial(CheckpointError, cure=self.cure, file=self.file, tensor=self.tensor), (self.problem,)
