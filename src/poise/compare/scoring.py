"""The loss of a task with weights from elsewhere."""

from __future__ import annotations

import torch

from poise.checkpoint import Checkpoint, CheckpointError
from poise.compare import randomness
from poise.compare.loop import evaluate
from poise.compare.tasks import Split, Task


def score(task: Task, checkpoint: Checkpoint, split: Split = "report", device: str = "cpu") -> float:
    """Mean loss over a split of the task's own model with a checkpoint's weights, whatever dtype they are stored in.

    A tensor of the model may be stored under its own name or under that which it is tied to; buffers that are not stored keep
    what the model begins with.

    Raises:
        CheckpointError: if a parameter is not stored, has another shape, or the checkpoint holds one that the model has not.
    """
    with randomness.own(0, device):
        model = task.model().to(device)
        own, parameters = model.state_dict(), dict(model.named_parameters(remove_duplicate=False))
        shared = {id(p): name for name, p in parameters.items() if name in checkpoint}
        with torch.no_grad():
            for name, place in own.items():
                found = checkpoint.ties.get(name, name)
                if found not in checkpoint:
                    if name in parameters and id(parameters[name]) not in shared:
                        raise _unlike(task, checkpoint, name, "is in the model and not in the checkpoint")
                    continue
                shape = checkpoint.info(found).shape
                if shape != place.shape:
                    said = f"has shape {list(shape)}, the model's is {list(place.shape)}"
                    raise _unlike(task, checkpoint, name, said)
                place.copy_(checkpoint[found])
        strange = next((name for name in checkpoint if name not in own and name not in checkpoint.ties.values()), None)
        if strange is not None:
            raise _unlike(task, checkpoint, strange, "is in the checkpoint and not in the model")
        return evaluate(task, model, split, 0, device)


def _unlike(task: Task, checkpoint: Checkpoint, name: str, problem: str) -> CheckpointError:
    return CheckpointError(problem, cure=f"is it of the model of task {task.name!r}?", file=checkpoint.path, tensor=name)
